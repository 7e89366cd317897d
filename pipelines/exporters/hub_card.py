"""The card of a hub folder: a header that names the files of each config, and what a reader must know of the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.card import SIZES, code, plain
from pipelines.exporters import Target
from pipelines.release import read_release

SAYS = {
    "samples": "what each sample is: prompt, captions, scores, model, plan, and where its noise comes from",
    "videos": "the encoded videos",
    "images": "the encoded images",
    "latents": "the final latents, scaled as `plan_json` of the sample says; C T H W, images C H W",
    "noise": "what each sample started from, of the latents' shape",
    "trajectories": (
        "states of the teacher's path, S first: place 0 is the noise, k what step k starts from, `steps` the final"
        " latent; with the timestep and the sigma of each"
    ),
    "embeddings": "each text once, by `text_id` and `negative_text_id` in `extra_json` of the sample; not padded",
}
"""Of each config, by its name without number; in the order of the card."""


def hub_card(target: Target, rows: int, tasks: Sequence[str]) -> str:
    """The text of README.md for what lies in the export's folder."""
    made = read_release(target.storage, target.release)
    configs = _configs(target.out)
    size = next((label for bound, label in SIZES if rows < bound), "n>10M")
    header = {
        "pretty_name": target.dataset,
        "license": "other",
        **({"task_categories": list(tasks)} if tasks else {}),
        "size_categories": [size],
        "tags": ["synthetic", "ditmill"],
        "configs": [
            {
                "config_name": config,
                "data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits],
                **({"default": True} if config == "samples" else {}),
            }
            for config, splits in configs.items()
        ],
    }
    lines = [
        f"# {plain(target.dataset)}",
        "",
        f"{rows:,} synthetic samples, made by ditmill {plain(made.ditmill)}: release {code(made.name)} of the dataset,"
        f" the samples where {code(made.where)}. Configs are joined by `sample_id`.",
        "",
        "| config | splits | what it holds |",
        "|---|---|---|",
        *(f"| `{config}` | {', '.join(splits)} | {_says(config)} |" for config, splits in configs.items()),
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        *(f'{config.replace("-", "_")} = load_dataset("PATH_OR_REPO", "{config}")' for config in configs),
        "```",
        "",
        *_licences(made.licences),
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines) + "\n"


def _configs(out: Path) -> dict[str, list[str]]:
    """Each config of the folder and its splits."""
    found: dict[str, set[str]] = {}
    for path in out.glob("*/*.parquet"):
        found.setdefault(path.parent.name, set()).add(path.stem.rpartition("-")[0])
    order = list(SAYS)
    return {name: sorted(found[name]) for name in sorted(found, key=lambda name: (order.index(_base(name)), name))}


def _base(config: str) -> str:
    return config.partition("-")[0]


def _says(config: str) -> str:
    return SAYS[_base(config)] + ("" if config == _base(config) else "; of another shape")


def _licences(licences: Sequence[Mapping[str, Any]]) -> list[str]:
    if not licences:
        return ["No model's licence is recorded."]
    rows = [
        f"| {code(licence.get('name') or 'unknown')} | {plain(licence.get('may_train') or 'unknown')} |"
        f" {plain(licence.get('why') or '')} |"
        for licence in licences
    ]
    return [
        "The models' licences, and whether they let outputs train other models:",
        "",
        "| licence | may train others | why |",
        "|---|---|---|",
        *rows,
        "",
        "This is a reading of the licences, not legal advice.",
    ]
