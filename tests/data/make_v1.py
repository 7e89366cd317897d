"""Makes `tests/data/v1`, a small dataset as schema version 1 has it, and what a reader must find in it.

    python tests/data/make_v1.py

The dataset is committed and never made anew: every later version has to read, extend and verify these very bytes. This
script says where they come from: the tiny pack's videos, run through the stages in one process, then labelled, withdrawn,
judged again by other thresholds, captioned and tagged by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE / "v1"

SPEC: dict[str, Any] = {
    "name": "v1",
    "prompts": {
        "inline": [
            {"prompt": "a red circle bouncing", "tags": ["shapes"], "licence": "CC0-1.0"},
            {"prompt": "ein blaues Quadrat, das sich dreht ☂", "negative_prompt": "blur", "source": "letters"},
            {"prompt": "a green star rising", "seed": 7},
            {"prompt": "a photo of snow", "num_frames": 1},
            {"prompt": "the sea at night", "id": "sea"},
            {"prompt": ""},
        ]
    },
    "samples_per_prompt": 2,
    "buckets": [{"height": 32, "width": 32, "num_frames": 5, "fps": 8.0}],
    "generators": [{"model": "pack://tiny"}],
    "sampler": {"num_inference_steps": 2},
    "layout": {"batch_size": 12},
    "judge": {"model": "pack://tiny", "thresholds": {"prompt_match": 0.5, "no_artefacts": 0.55, "motion_smooth": 0.6}},
    "caption": {"model": "pack://tiny", "max_new_tokens": 8},
    "output": {"keep_rejected": "preview", "tensors": {"latents": "float16"}},
}


def main() -> None:
    os.environ.update(MKL_CBWR="AUTO,STRICT", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, str(HERE.parents[1]))
    shutil.rmtree(ROOT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # Delta's log names the place where a table was created
        SPEC["output"]["uri"] = f"{folder}/v1"
        storage = _generate()
        _annotate(storage)
        expected = json.dumps(_expected(storage), indent=1, ensure_ascii=False)
        shutil.copytree(f"{folder}/v1", ROOT)
    (HERE / "v1.json").write_text(f"{expected}\n", encoding="utf-8")
    print(f"{sum(path.stat().st_size for path in ROOT.rglob('*') if path.is_file()):,} bytes in {ROOT}")


def _resolve(**sections: dict[str, Any]) -> Any:
    """The run; what it records of itself names no place or machine of today."""
    from pipelines import resolve, run
    from pipelines.spec import parse_spec

    socket.gethostname = lambda: "node-1"
    sys.argv = ["ditmill", "run", "v1.yaml"]
    resolve.code_version = run.code_version = lambda: "0.1.0"  # type: ignore[assignment]
    spec = {**SPEC, **{name: {**SPEC[name], **changes} for name, changes in sections.items()}}
    found = resolve.resolve_spec(parse_spec(spec))
    return replace(
        found, spec=found.spec.model_copy(update={"output": found.spec.output.model_copy(update={"uri": "out/v1"})})
    )


def _generate() -> Any:
    import numpy as np

    from infra.commit import Committer, Part
    from infra.control import sweep
    from infra.tables import Table
    from pipelines.enumeration import Batches
    from pipelines.recipes import RECIPES
    from pipelines.run import expand, open_dataset
    from pipelines.run_rows import commit_run_row
    from stages.actor import run_stage

    run = _resolve()
    open_dataset(run)
    enumeration, _ = expand(run, lambda: ())
    ids = json.dumps({"generator_ids": run.generator_ids, "plan_id": run.plan.plan_id})
    known = {"plan_file": enumeration.plan_file, "planned": len(enumeration), "extra_json": ids}
    commit_run_row(run, "started", status="running", **known)
    committers = {name: Committer(Table(run.storage, name), run.run_id) for name in ("samples", "failures")}
    todo = Batches(enumeration, lambda ids: np.zeros(len(ids), bool), run.spec.layout.batch_size, {}, run.spec.seed)
    counts = dict.fromkeys(("accepted", "rejected", "failed"), 0)
    for number, batch in enumerate(todo):
        batch["batch_index"][:] = number
        for stage in (*RECIPES["synthetic"].generating(run), *RECIPES["synthetic"].judging(run)):
            stage.load()
            batch, _ = run_stage(stage, batch)
        result = json.loads(batch["result"][0])
        counts = {name: count + result[name] for name, count in counts.items()}
        for part in result["parts"]:
            committers[part["table"]].commit([Part(part["path"], part["nbytes"], part["rows"])])
    ended = {
        **counts,
        "planned_through": len(enumeration),
        "allocated_accelerator_seconds": 12.5,
        "reproducible": "bitwise",
    }
    commit_run_row(run, "ended", status="exhausted", **known, **ended)
    sweep(run.storage, run.run_id)
    return run.storage


def _annotate(storage: Any) -> None:
    from infra.commit import Committer
    from infra.tables import Table
    from pipelines.annotate import label, rejudge, restore, withdraw
    from stages.annotate import Annotator

    rows = Table(storage, "samples").read().to_pylist()
    accepted = sorted(row["sample_id"] for row in rows if row["verdict"] == "accepted")
    rejected = sorted(row["sample_id"] for row in rows if row["verdict"] == "rejected")
    labels = HERE / "labels.csv"
    labels.write_text(f"sample_id,label,note\n{accepted[0]},y,\n{accepted[1]},n,too dark\n{rejected[0]},u,\n")
    label(storage, str(labels))
    labels.unlink()
    withdraw(storage, accepted[:2], "asked to be removed")
    restore(storage, accepted[:1])
    rejudge(
        _resolve(judge={"thresholds": {"prompt_match": 0.5, "no_artefacts": 0.1, "motion_smooth": 0.5}}), lambda: None
    )
    who = Annotator(storage, "20260101t000000-aaaaaa", "a person", "r1", "r1")
    said = [
        *who.scores(accepted[2], {"beauty": 0.75}),
        *who.captions(accepted[2], [{"style": "short", "text": "A red circle bounces."}]),
        who.row(accepted[2], "tag", "", "favourite"),
    ]
    committer = Committer(Table(storage, "annotations"), who.run_id)
    committer.commit([who.write(said, 0)])


def _expected(storage: Any) -> dict[str, Any]:
    """What a reader must find."""
    from dataclasses import asdict

    from infra.schema import TABLES
    from infra.tables import Table
    from pipelines.decisions import read_decisions

    samples = Table(storage, "samples").read().to_pylist()
    return {
        "rows": {name: Table(storage, name).read().num_rows for name in TABLES},
        "verdicts": {row["sample_id"]: row["verdict"] for row in samples},
        "captions": {row["sample_id"]: row["caption"] for row in samples},
        "media": {row["sample_id"]: [item["sha256"] for item in (*row["media"], *row["tensors"])] for row in samples},
        "failures": [row["error_type"] for row in Table(storage, "failures").read().to_pylist()],
        "decisions": {sample_id: asdict(one) for sample_id, one in sorted(read_decisions(storage).items())},
    }


if __name__ == "__main__":
    main()
