"""Prompt records: one line of input each, with what it says about its own media, ready to be given an id.

A record is never dropped for what its prompt is. A prompt that is no UTF-8 is kept with its bytes written as \\xNN and
`extra["bad_text"]` true, an input that cannot be read gives `extra["bad_input"]` the reason: EncodeText fails such a
sample, as it fails one without words, and the rest of the dataset goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from infra.errors import UserError
from pipelines import spec
from pipelines.dedup import Deduplicator, Exclusions, RecordReport
from pipelines.identity import Input, Shape, prompt_id
from pipelines.record_fields import (
    clean,
    clean_text,
    inputs_field,
    is_absent,
    number_field,
    tags_field,
    text_field,
    whole_field,
)
from pipelines.record_files import FIELDS, Row, no_prompt, read_rows

BUCKET_DOMAIN = "ditmill/bucket/v1"
BAD_TEXT = "bad_text"
BAD_INPUT = "bad_input"


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line of input, its bucket and seed settled."""

    prompt: str
    height: int
    width: int
    num_frames: int
    fps: float
    seed: int
    inputs: tuple[Input, ...] = ()
    negative_prompt: str = ""
    tags: tuple[str, ...] = ()
    licence: str = ""
    id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        return Shape(self.height, self.width, self.num_frames, self.fps)

    @property
    def is_bad(self) -> bool:
        """Whether its samples are known to fail."""
        return not self.prompt.strip() or BAD_TEXT in self.extra or BAD_INPUT in self.extra

    def prompt_id(self, expander: str = "", variant: int = 0) -> str:
        """The id of one of its variants; without an expander, of the record as it is."""
        return prompt_id(
            self.prompt,
            inputs=self.inputs,
            negative_prompt=self.negative_prompt,
            shape=self.shape,
            seed=self.seed,
            own_id=self.id,
            expander=expander,
            variant=variant,
        )


def read_records(
    prompts: spec.Prompts,
    buckets: Sequence[spec.Bucket],
    seed: int,
    report: RecordReport | None = None,
    storage: spec.Storage | None = None,
    policy: spec.Policy | None = None,
) -> Iterator[PromptRecord]:
    """All records of `prompts`, as a stream, in order. `seed` is of those that give none.

    An input that `policy` does not allow makes its record a bad one.

    Raises UserError for a file that is missing, empty, of no known format or damaged, and for a field of the wrong type.
    """
    report = report if report is not None else RecordReport()
    if prompts.path is None:
        rows: Iterable[Row] = _inline(prompts)
    else:
        rows = read_rows(prompts.path, key="prompts.path", column=prompts.column, storage=storage)
    for row in rows:
        if row.fields is None:
            report.blank += 1
            continue
        try:
            record = _record(row, prompts.column, buckets, seed, storage, policy)
        except RecursionError as error:
            raise UserError(f"{row.place}: is nested too deeply; make it flat") from error
        report.read += 1
        report.bad += record.is_bad
        yield record


def unique_records(of: spec.Spec, report: RecordReport | None = None) -> Iterator[PromptRecord]:
    """The records of a spec that are kept: no identical ones, none that `prompts.exclude` keeps out."""
    for record, _ in _unique(of, report):
        yield record


def resolve_prompts(of: spec.Spec, report: RecordReport | None = None) -> Iterator[dict[str, Any]]:
    """Rows of the table `prompts`, without run_id and created_at, of a spec whose prompts are not expanded."""
    for record, identity in _unique(of, report):
        yield _row(record, record.prompt, 0, "", identity)


def expand_rows(
    record: PromptRecord, texts: Sequence[str], expander_fingerprint: str, keep_original: bool = False
) -> list[dict[str, Any]]:
    """Rows of the table `prompts` for what an expander made of a record: text i is variant i.

    The record's own prompt, where kept, comes first and is the row that it has without expansion. Texts of a language model
    may be no Unicode either; such a row is marked as a record is.
    """
    rows = [_row(record, record.prompt, 0, "", record.prompt_id())] if keep_original else []
    for variant, text in enumerate(texts):
        rows.append(_row(record, text, variant, expander_fingerprint, record.prompt_id(expander_fingerprint, variant)))
    return rows


def variant_ids(record: PromptRecord, expand: spec.Expand | None, expander_fingerprint: str = "") -> list[str]:
    """The ids of the rows that a record will have, before any text of them exists, in the order of `expand_rows`."""
    if expand is None:
        return [record.prompt_id()]
    own = [record.prompt_id()] if expand.keep_original else []
    return own + [record.prompt_id(expander_fingerprint, variant) for variant in range(expand.variants)]


def draw_bucket(
    buckets: Sequence[spec.Bucket], prompt: str, seed: int, given: Mapping[str, float] | None = None
) -> Shape:
    """The shape of a record's media: what it gives itself, the rest from a bucket drawn by weight from a hash of the prompt.

    Only buckets that agree with what is given take part, where there are any. The draw is weighted rendezvous hashing
    (Thaler and Ravishankar 1998): it looks at no other prompt, and a bucket that is added or weighs more than before takes
    prompts over but makes no others change places.
    """
    given = given or {}
    shapes: dict[Shape, float] = {}
    for bucket in buckets:
        shape = Shape(bucket.height, bucket.width, bucket.num_frames, float(bucket.fps))
        shapes[shape] = shapes.get(shape, 0.0) + bucket.weight
    if given:
        fits = [shape for shape in shapes if all(getattr(shape, name) == value for name, value in given.items())]
        shapes = {shape: shapes[shape] for shape in fits} or shapes
    if len(shapes) == 1:
        drawn = next(iter(shapes))
    else:
        drawn = min(shapes, key=lambda shape: -math.log(_uniform(shape, prompt, seed)) / shapes[shape])
    if not given:
        return drawn
    return Shape(
        int(given.get("height", drawn.height)),
        int(given.get("width", drawn.width)),
        int(given.get("num_frames", drawn.num_frames)),
        float(given.get("fps", drawn.fps)),
    )


def _uniform(shape: Shape, prompt: str, seed: int) -> float:
    """A number in (0, 1) that belongs to a prompt and a shape."""
    text = f"{BUCKET_DOMAIN}\n{seed}\n{shape.height} {shape.width} {shape.num_frames} {shape.fps!r}\n{prompt}"
    return (int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big") + 0.5) / 2**48


def _unique(of: spec.Spec, report: RecordReport | None) -> Iterator[tuple[PromptRecord, str]]:
    report = report if report is not None else RecordReport()
    storage = of.output.storage
    keeper = Deduplicator(of.prompts, Exclusions.read(of.prompts, storage), report)
    for found in read_records(of.prompts, of.buckets, of.seed, report, storage, of.policy):
        record = replace(found, seed=of.schedule.seed(found.seed)) if of.schedule.tick else found
        identity = record.prompt_id()
        if keeper.keeps(record, identity):
            yield record, identity


def _row(record: PromptRecord, text: str, variant: int, expander: str, identity: str) -> dict[str, Any]:
    prompt, is_bad = clean_text(text)
    extra = {**record.extra, BAD_TEXT: True} if is_bad else record.extra
    return {
        "prompt_id": identity,
        "source_prompt": record.prompt,
        "prompt": prompt,
        "negative_prompt": record.negative_prompt,
        "variant": variant,
        "expander": expander,
        "inputs": [asdict(item) for item in record.inputs],
        "height": record.height,
        "width": record.width,
        "num_frames": record.num_frames,
        "fps": record.fps,
        "seed": record.seed,
        "tags": list(record.tags),
        "licence": record.licence,
        "extra_json": json.dumps(extra, ensure_ascii=False) if extra else "",
    }


def _inline(prompts: spec.Prompts) -> Iterator[Row]:
    for at, item in enumerate(prompts.inline):
        place = f"prompts.inline.{at}"
        fields = {prompts.column: item} if isinstance(item, str) else item
        if prompts.column not in fields:
            raise UserError(no_prompt(place, prompts.column, fields))
        yield Row(place, fields, str(Path.cwd()))


def _record(
    row: Row,
    column: str,
    buckets: Sequence[spec.Bucket],
    seed: int,
    storage: spec.Storage | None,
    policy: spec.Policy | None,
) -> PromptRecord:
    fields = {name: value for name, value in (row.fields or {}).items() if not is_absent(value)}
    place = row.place
    prompt, bad_prompt = clean_text(text_field(place, column, fields.get(column, "")))
    negative, bad_negative = clean_text(text_field(place, "negative_prompt", fields.get("negative_prompt", "")))
    given: dict[str, float] = {}
    for name, least in (("height", 8), ("width", 8), ("num_frames", 1)):
        if name in fields:
            given[name] = whole_field(place, name, fields[name], least, 2**31 - 1)
    if "fps" in fields:
        given["fps"] = number_field(place, "fps", fields["fps"])
    extra = {
        clean_text(str(name))[0]: clean(value)
        for name, value in fields.items()
        if name != column and name not in FIELDS
    }
    own_id = clean_text(text_field(place, "id", fields["id"], numbers=True))[0] if "id" in fields else ""
    if own_id:
        extra["id"] = own_id
    if bad_prompt or bad_negative:
        extra[BAD_TEXT] = True
    inputs, unreadable = inputs_field(row, fields, storage, policy)
    if unreadable:
        extra[BAD_INPUT] = unreadable
    licence = "licence" if "licence" in fields else "license"
    shape = draw_bucket(buckets, prompt, seed, given)
    return PromptRecord(
        prompt=prompt,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        fps=shape.fps,
        seed=whole_field(place, "seed", fields["seed"], 0, 2**63 - 1) if "seed" in fields else seed,
        inputs=inputs,
        negative_prompt=negative,
        tags=tags_field(place, fields.get("tags", ())),
        licence=clean_text(text_field(place, licence, fields.get(licence, "")))[0],
        id=own_id,
        extra=extra,
    )
