"""WriteShards: a finished batch to one closed tar, its Parquet parts and one row that says what was written.

It keeps nothing between calls. What it writes does not exist for readers until the run's committer has put the parts
into the tables; a call that is repeated writes other files, whose names never meet the first ones.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from uuid import uuid4

import numpy as np
import orjson

from infra.schema import EMBEDDINGS, FAILURES, SAMPLES
from infra.shard import Place, build_tar
from infra.storage import Storage
from stages.batch import STOPPED, Batch, SampleError, jsons, size
from stages.early import NAME
from stages.embeddings import Texts, texts_of
from stages.look import source_of
from stages.tensors import Compression, KeptStates, no_latents, sample_tensors
from stages.writable import check_writable, is_plain, valid

if TYPE_CHECKING:
    import pyarrow as pa

    from infra.media import Encoded

VALIDATION_SHARE = 0.02
TOLD = ("noise_sha256", "text_id", "negative_text_id", "trajectory")
"""What recipes for distillation tell of a sample in `extra_json`, in the place of a user's columns of these names."""
ACCELERATED = "accelerated"
"""What techniques of the plan saved of a sample: the column, and the name in `extra_json`."""
OF_SAMPLING = (ACCELERATED, NAME)
"""The same of all that sampling tells of a sample."""

Row = dict[str, Any]


@dataclass(frozen=True)
class GeneratorFacts:
    """What a row says of the generator that made it. `adapters` are {uri, sha256, weight}.

    `plan_json` is the plan as asked for; a batch's own column `plan_json` says what became of it, and goes before this.
    """

    model: str
    model_sha256: str
    plan_id: str
    plan_json: str
    num_inference_steps: int
    guidance_scale: float
    adapters: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class WriteShards:
    """Writes a whole batch, failed samples too, and returns one row: column `result`, a JSON text of

        batch_index, parts: [{table, path, nbytes, rows}], media: [names of tars], media_nbytes, accepted, rejected,
        failed, ledger: what the batch's own column `ledger` holds in its first row, else []

    where samples that were stopped early count as rejected, though they are rows of failures.

    Media first, then parts, so that a part never refers to what is not there. With `tensors: {text_embeddings: ...}` the
    batch's new texts go to a tar of their own, `text/<run>/<batch>.tar`, and to rows of `embeddings`. A sample that cannot
    be written (its text is no valid Unicode, a number is not finite) becomes a failure; OSError goes to the caller as it is.
    """

    storage: Storage
    run_id: str
    recipe: str
    generators: tuple[GeneratorFacts, ...]
    layout_json: str
    judge: str
    rubric: str
    code_version: str
    keep_rejected: Literal["preview", "latents", "media", "none"] = "preview"
    image_format: Literal["webp", "png"] = "png"
    crf: int = 18
    marked: bool = True
    tensors: dict[str, str] = field(default_factory=dict)
    trajectory: KeptStates | None = None
    with_media: bool = True
    compression: Compression = "none"

    name: ClassVar[str] = "write"
    reads: ClassVar[tuple[str, ...]] = ("sample_id", "frames", "latents", "verdict")
    adds: ClassVar[tuple[str, ...]] = ("result",)
    skips_rejected: ClassVar[bool] = False
    takes_failed: ClassVar[bool] = True

    def load(self) -> None:
        import av  # noqa: F401
        import PIL.Image  # noqa: F401
        import pyarrow.parquet  # noqa: F401

    def __call__(self, batch: Batch) -> Batch:
        written = _Written(self, batch, datetime.now(UTC), uuid4().hex[:8])
        for at in range(size(batch)):
            written.add(at)
        return {"result": jsons([written.close()])}

    @cached_property
    def device(self) -> str:
        """The accelerator of this process, or cpu. torch is not imported for it: who sampled here has done so."""
        torch = sys.modules.get("torch")
        return str(torch.cuda.get_device_name()) if torch is not None and torch.cuda.is_available() else "cpu"


def split_of(source: str) -> str:
    """train or, for 2% of source prompts, validation: all samples of all variants of a prompt are on one side. Of clips the
    source is the file that they were cut from."""
    digest = hashlib.blake2b(source.encode("utf-8", "replace"), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64 else "train"


class _Written:
    """One call's rows and tar members, until `close` writes them."""

    def __init__(self, stage: WriteShards, batch: Batch, now: datetime, nonce: str) -> None:
        self.stage, self.batch, self.now = stage, batch, now
        self.batch_index = int(batch["batch_index"][0])
        self.file = f"{self.batch_index:08d}-{nonce}"
        self.part = f"{stage.run_id}-{self.file}"
        self.rows: dict[str, list[Row]] = {"accepted": [], "rejected": []}
        self.members: dict[str, list[tuple[str, bytes]]] = {"accepted": [], "rejected": []}
        self.failures: list[Row] = []
        self._doubtful = not is_plain(batch)
        dtype = stage.tensors.get("text_embeddings", "")
        settings = (stage.storage, stage.run_id, now, dtype, stage.compression)
        self.texts = texts_of(batch, *settings) if dtype else Texts([], [])
        self._parsed: dict[str, Any] = {}
        self._values = {name: column.tolist() for name, column in batch.items() if column.ndim == 1}

    def add(self, at: int) -> None:
        if self._text(at, "error_type"):
            self.failures.append(self._failure(at))
            return
        try:
            row, members = self._sample(at)
        except SampleError as fault:
            self.failures.append(self._failure(at, fault))
            return
        self.rows[row["verdict"]].append(row)
        self.members[row["verdict"]] += members

    def close(self) -> Row:
        """Write tars, then parts; what to say of them."""
        media: list[str] = []
        media_nbytes = 0
        for verdict, folder in (("accepted", "media"), ("rejected", "rejected")):
            if not self.members[verdict]:
                continue
            shard = f"{folder}/{self.stage.run_id}/{self.file}.tar"
            data, places = build_tar(self.members[verdict])
            self.stage.storage.write_bytes(shard, data)
            _refer(self.rows[verdict], shard, places)
            media.append(shard)
            media_nbytes += len(data)
        if self.texts.members:
            shard = f"text/{self.stage.run_id}/{self.file}.tar"
            data, places = build_tar(self.texts.members)
            self.stage.storage.write_bytes(shard, data)
            _refer(self.texts.rows, shard, places)
            media.append(shard)
            media_nbytes += len(data)
        samples = self.rows["accepted"] + self.rows["rejected"]
        parts = [
            self._part("embeddings", self.texts.rows, EMBEDDINGS),
            self._part("samples", samples, SAMPLES),
            self._part("failures", self.failures, FAILURES),
        ]
        stopped = sum(row["error_type"] == STOPPED for row in self.failures)
        return {
            "batch_index": self.batch_index,
            "parts": [part for part in parts if part["rows"]],
            "media": media,
            "media_nbytes": media_nbytes,
            "accepted": len(self.rows["accepted"]),
            "rejected": len(self.rows["rejected"]) + stopped,
            "failed": len(self.failures) - stopped,
            "ledger": self._json(0, "ledger", []),
        }

    def _part(self, table: str, rows: list[Row], schema: pa.Schema) -> Row:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = f"{table}/{self.part}.parquet"
        if not rows:
            return {"table": table, "path": path, "nbytes": 0, "rows": 0}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        self.stage.storage.write_bytes(path, data)
        return {"table": table, "path": path, "nbytes": len(data), "rows": len(rows)}

    def _failure(self, at: int, fault: SampleError | None = None) -> Row:
        row = {
            "sample_id": self._text(at, "sample_id"),
            "attempt": self._int(at, "attempt"),
            "prompt_id": self._text(at, "prompt_id"),
            "prompt": self._text(at, "prompt"),
            "sample_index": self._int(at, "sample_index"),
            "stage": self.stage.name if fault else self._text(at, "error_stage"),
            "error_type": fault.error_type if fault else self._text(at, "error_type"),
            "error": str(fault) if fault else self._text(at, "error"),
            "cost": self._json(at, "cost", []),
            "run_id": self.stage.run_id,
            "node": socket.gethostname(),
            "created_at": self.now,
        }
        return {key: valid(value) if isinstance(value, str) else value for key, value in row.items()}

    def _sample(self, at: int) -> tuple[Row, list[tuple[str, bytes]]]:
        """A row, its media without places, and the members that hold them."""
        row = self._facts(at)
        if self._doubtful:
            check_writable({**row, "extra_json": json.loads(row["extra_json"])}, "")
        members: list[tuple[str, bytes]] = []
        accepted = row["verdict"] == "accepted"
        keep = "media" if accepted else self.stage.keep_rejected
        if keep in ("media", "preview") and self.stage.with_media:
            role, encoded = self._encoded(at, row["fps"], keep == "preview")
            row["media"].append(_media(row["sample_id"], role, encoded))
            members.append((row["media"][0]["member"], encoded.data))
        if dtypes := self._dtypes(accepted, keep == "latents"):
            if "latents" not in self.batch:
                raise no_latents(row["model"], "output.tensors" if accepted else "output.keep_rejected")
            known = [name for name in ("latents", "trajectory") if name in self.batch]
            values: dict[str, np.ndarray] = {name: self.batch[name][at] for name in known}
            said = json.loads(row["extra_json"]).get("trajectory")
            for reference, member in sample_tensors(row, values, dtypes, said, self.stage.compression):
                row["tensors"].append(reference)
                members.append(member)
        if accepted and members:
            members.append((f"{row['sample_id']}.json", sidecar(row)))
        return row, members

    def _dtypes(self, accepted: bool, latents: bool) -> dict[str, str]:
        """Role -> dtype of the tensors that are kept of a sample; of a rejected one `latents` at most."""
        stage = self.stage
        if not accepted:
            return {"latents": stage.tensors.get("latents", "float32")} if latents else {}
        dtypes = {role: dtype for role, dtype in stage.tensors.items() if role != "text_embeddings"}
        return dtypes | ({"trajectory": stage.trajectory.dtype} if stage.trajectory else {})

    def _encoded(self, at: int, fps: float, preview: bool) -> tuple[str, Encoded]:
        """The role of a sample's media, and the media."""
        from infra.media import encode, preview_strip

        if not preview and "encoded" in self.batch:
            kept: Encoded = self.batch["encoded"][at]
            return kept.mime.partition("/")[0], kept
        frames = self.batch["frames"][at]
        try:
            if preview:
                return "preview", preview_strip(frames)
            role = "image" if len(frames) == 1 else "video"
            return role, encode(frames, fps, self.stage.image_format, self.stage.crf, marked=self.stage.marked)
        except ValueError as error:
            raise SampleError("bad_media", str(error)) from error

    def _facts(self, at: int) -> Row:
        stage = self.stage
        facts = stage.generators[self._int(at, "generator")]
        verdict = self._text(at, "verdict")
        if verdict not in ("accepted", "rejected"):
            raise ValueError(f"{self._text(at, 'sample_id')}: expected verdict accepted or rejected, found {verdict!r}")
        source_prompt = self._text(at, "source_prompt")
        licence = self._text(at, "licence")
        return {
            "sample_id": self._text(at, "sample_id"),
            "noise_key": self._text(at, "noise_key"),
            "run_id": stage.run_id,
            "recipe": stage.recipe,
            "prompt_id": self._text(at, "prompt_id"),
            "source_prompt": source_prompt,
            "prompt": self._text(at, "prompt"),
            "negative_prompt": self._text(at, "negative_prompt"),
            "sample_index": self._int(at, "sample_index"),
            "seed": self._int(at, "seed"),
            "inputs": self._json(at, "inputs", []),
            "model": facts.model,
            "model_sha256": facts.model_sha256,
            "adapters": list(facts.adapters),
            "plan_id": facts.plan_id,
            "plan_json": self._text(at, "plan_json") or facts.plan_json,
            "layout_json": stage.layout_json,
            "num_inference_steps": facts.num_inference_steps,
            "guidance_scale": facts.guidance_scale,
            "nfe": self._int(at, "nfe"),
            "height": self._int(at, "height"),
            "width": self._int(at, "width"),
            "num_frames": self._int(at, "num_frames"),
            "fps": float(self._values["fps"][at]),
            "media": [],
            "tensors": [],
            "scores": [{**score, "value": float(score["value"])} for score in self._json(at, "scores", [])],
            "verdict": verdict,
            "reasons": self._json(at, "reasons", []),
            "judge": stage.judge,
            "rubric": stage.rubric,
            "caption": self._text(at, "caption"),
            "captions": [item for item in self._json(at, "captions", []) if item["text"]],
            "tags": self._json(at, "tags", []),
            "split": split_of(source_of(self._text(at, "inputs")) if stage.recipe == "curate" else source_prompt),
            "parent_ids": [],
            "round": 0,
            "cost": self._json(at, "cost", []),
            "node": self._text(at, "node") or socket.gethostname(),
            "device": self._text(at, "device") or stage.device,
            "code_version": stage.code_version,
            "created_at": self.now,
            "extra_json": _extra(
                self._text(at, "extra"), licence, self._text(at, "decomposed"), self._distilling(at, facts)
            ),
        }

    def _distilling(self, at: int, facts: GeneratorFacts) -> tuple[tuple[str, str], ...]:
        """What recipes for distillation, and sampling itself, tell of a sample, as names and JSON."""
        said = {name: json.dumps(value) for name in TOLD[:-1] if (value := self._text(at, name))}
        said |= {name: value for name in OF_SAMPLING if (value := self._text(at, name))}
        if self.stage.trajectory is not None:
            plan = json.loads(self._text(at, "plan_json") or "{}")
            said["trajectory"] = json.dumps(self.stage.trajectory.facts(plan, facts.num_inference_steps))
        return tuple(said.items())

    def _text(self, at: int, column: str) -> str:
        values = self._values.get(column)
        return str(values[at] or "") if values else ""

    def _int(self, at: int, column: str) -> int:
        values = self._values.get(column)
        return int(values[at]) if values else 0

    def _json(self, at: int, column: str, empty: Any) -> Any:
        """A value to read and not to change: samples of a batch that have the same text share it."""
        text = self._text(at, column)
        if not text:
            return empty
        if text not in self._parsed:
            self._parsed[text] = json.loads(text)
        return self._parsed[text]


@lru_cache
def _extra(text: str, licence: str, decomposed: str, more: tuple[tuple[str, str], ...] = ()) -> str:
    """A sample's own fields as JSON. Where nothing is scored, a whole batch has the same ones."""
    extra = {**json.loads(text or "{}"), **({"licence": licence} if licence else {})}
    if decomposed:
        extra["decomposed"] = json.loads(decomposed)
    if any(name in TOLD for name, _ in more):
        extra = {name: value for name, value in extra.items() if name not in TOLD}
    extra |= {name: json.loads(value) for name, value in more}
    return json.dumps(extra, ensure_ascii=False, sort_keys=True)


def _media(sample_id: str, role: str, encoded: Encoded) -> Row:
    return {
        "role": role,
        "member": f"{sample_id}.{encoded.suffix}",
        "mime": encoded.mime,
        "codec": encoded.codec,
        "sha256": hashlib.sha256(encoded.data).hexdigest(),
    }


def _refer(rows: list[Row], shard: str, places: dict[str, Place]) -> None:
    for row in rows:
        for reference in [*row.get("media", ()), *row["tensors"]]:
            reference["shard"] = shard
            reference["offset"], reference["nbytes"] = places[reference["member"]]


SIDECAR = (
    "sample_id", "prompt", "source_prompt", "negative_prompt", "caption", "captions", "scores", "height", "width",
    "num_frames", "fps", "noise_key", "seed", "sample_index", "model", "model_sha256", "plan_id", "split",
)  # fmt: skip
"""What a tar says of a sample beside its media: the same keys and types in each, so that any loader can infer them from
the first few, and nothing that another run of the same sample would say differently."""


def sidecar(row: Row) -> bytes:
    """The .json of a sample in a tar."""
    return orjson.dumps({key: row[key] for key in SIDECAR}, option=orjson.OPT_SORT_KEYS)
