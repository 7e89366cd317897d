"""The dataset card: README.md at the dataset's root, with the YAML header that dataset hubs and HF `datasets` read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import yaml

from infra.printable import printable
from infra.secrets import redact
from infra.storage import Storage
from infra.tables import Table, dataset_exists, read_dataset_json
from pipelines.charts import number
from pipelines.decisions import read_decisions
from pipelines.gallery import clamp
from pipelines.report_data import Facts, Snapshot, read_facts
from pipelines.run_log import Run, thresholds

SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
CONFIGS = ("samples", "prompts", "embeddings", "annotations")

RECIPES = {
    "reflow": "Each sample is a coupling: its final latent, and its noise, drawn again from `noise_key`.",
    "trajectory": "Of each sample chosen states of the teacher's path are kept; `extra_json` says which.",
    "curate": "Clips were cut out of media that existed: `inputs` has each one's source, its sha256, start and end; no model"
    " made them, and `prompt` is the caption that the source came with.",
    "prompts": "Rows are prompts with their text embeddings; nothing was sampled, and there are no media.",
}
"""What a reader has to know of datasets that are more, or less, than media."""

COLUMNS = {
    "sample_id": "the sample's name: a hash of prompt, sample index, checkpoint and sampler plan",
    "noise_key": "what its starting noise is drawn from; the same for each model and plan of the same prompt",
    "prompt, source_prompt, negative_prompt": "what the model was given, and the record it was expanded from",
    "model, model_sha256, adapters, plan_json": "what generated it",
    "height, width, num_frames, fps": "its media's shape",
    "media, tensors": "where the bytes are: tar shard, member, offset, size and sha256",
    "scores, verdict, reasons, judge, rubric": "what was thought of it",
    "caption, captions": "what is seen in it",
    "split": "a hash of the source prompt, so that variants of one prompt stay together",
    "cost": "accelerator-seconds and CPU-seconds by stage",
    "run_id, device, node, code_version, created_at": "which run made it, where and when",
}


def write_card(storage: Storage, license: str = "other", out: str = "README.md") -> str:
    """Write the card under the dataset's root, and return its text.

    `license` is the dataset's own, as hubs spell it; what the models' licences say of it is in the text either way.
    """
    snapshot = Snapshot(storage)
    facts = read_facts(snapshot, read_decisions(storage))
    text = card(storage, snapshot, facts, license)
    storage.write_bytes(out, text.encode())
    return text


def card(storage: Storage, snapshot: Snapshot, facts: Facts, license: str) -> str:
    """The card's text."""
    from jinja2 import Environment, StrictUndefined

    said = read_dataset_json(storage) if dataset_exists(storage) else {}
    name, recipe = str(said.get("name") or "dataset"), said.get("recipe", "synthetic")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # Markdown: see `plain`
    environment.filters |= {"number": number, "plain": plain, "code": code, "line": line}
    last = facts.runs[-1] if facts.runs else None
    shapes = [] if recipe == "prompts" else _shapes(snapshot)
    template = environment.from_string(resources.files("pipelines").joinpath("card.md").read_text(encoding="utf-8"))
    body = template.render(
        name=name,
        recipe=RECIPES.get(recipe, ""),
        with_media=recipe != "prompts",
        facts=facts,
        last=last,
        shapes=shapes,
        generators=_generators(last),
        sampler=_pairs(last, "sampler"),
        judge=_pairs(last, "judge"),
        bars=_bars(last),
        caption=_pairs(last, "caption"),
        licences=_licences(facts.runs),
        columns=COLUMNS,
    )
    header = _header(storage, name, facts, shapes, license)
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def line(text: Any, limit: int = 300) -> str:
    """Text on one line, whatever ends a line in Markdown, with what is not seen written out."""
    return printable(" ".join(clamp(redact(str(text)), limit).split()))


def plain(text: Any, limit: int = 300) -> str:
    """Text that stays text in Markdown: on one line, with nothing that starts markup, a link or HTML."""
    shown = line(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", shown)
    return re.sub(r"(?i)\b(https?|ftp|www|mailto)(?=[:.])", r"\1&#8203;", shown)  # or readers would make it a link


def code(text: Any, limit: int = 300) -> str:
    """Text as a code span on one line; within one nothing is markup."""
    shown = line(text, limit).replace("`", "'").replace("|", "/")
    return f"`{shown}`" if shown else ""


def _header(
    storage: Storage, name: str, facts: Facts, shapes: Sequence[Mapping[str, Any]], license: str
) -> dict[str, Any]:
    video = any(shape["num_frames"] > 1 for shape in shapes)
    image = any(shape["num_frames"] == 1 for shape in shapes)
    inputs = any(shape["inputs"] for shape in shapes)
    tasks = [
        f"{'image' if inputs else 'text'}-to-{kind}" for kind, here in (("video", video), ("image", image)) if here
    ]
    size = next((label for bound, label in SIZES if facts.generated < bound), "n>10M")
    configs = [
        {"config_name": table, "data_files": f"{table}/*.parquet", **({"default": True} if table == "samples" else {})}
        for table in CONFIGS
        if Table(storage, table).files()  # a loader refuses a glob that matches nothing
    ]
    header: dict[str, Any] = {"pretty_name": name, "license": license}
    if tasks:
        header["task_categories"] = tasks
    header |= {"size_categories": [size], "tags": ["synthetic", "ditmill", *(["video"] if video else [])]}
    return header | ({"configs": configs} if configs else {})


def _shapes(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The shapes of media in the dataset, most frequent first."""
    counts: dict[tuple[Any, ...], int] = {}
    for _, batch in snapshot.batches(("height", "width", "num_frames", "fps", "inputs")):
        keys = zip(*(batch[name].to_pylist() for name in ("height", "width", "num_frames", "fps")), strict=True)
        for key, inputs in zip(keys, batch["inputs"].to_pylist(), strict=True):
            counts[(*key, bool(inputs))] = counts.get((*key, bool(inputs)), 0) + 1
    names = ("height", "width", "num_frames", "fps", "inputs")
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in ordered]


def _generators(run: Run | None) -> list[str]:
    return [
        str(item.get("model"))
        for item in (run.spec.get("generators") or [] if run else [])
        if isinstance(item, Mapping)
    ]


def _pairs(run: Run | None, section: str) -> str:
    """The plain values of a section of the spec, on one line."""
    found = run.spec.get(section) if run else None
    if not isinstance(found, Mapping):
        return ""
    told = {
        name: value for name, value in found.items() if not isinstance(value, Mapping) and value not in (None, "", [])
    }
    return ", ".join(
        f"{key}={'+'.join(map(str, said)) if isinstance(said, list) else said}" for key, said in told.items()
    )


def _bars(run: Run | None) -> list[str]:
    found = thresholds(run.spec, run.points) if run else {}
    return [
        f"{name} {'>=' if bound.least else '<='} {number(bound.value)}"
        for name, bounds in found.items()
        for bound in bounds
    ]


def _licences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The licences of all models that any run used, each once."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        listed = run.licences if isinstance(run.licences, list) else []
        for item in listed:
            if isinstance(item, Mapping):
                one = {key: str(item.get(key) or "unknown") for key in ("name", "may_train", "why")}
                found[one["name"], one["may_train"]] = one
    return list(found.values())
