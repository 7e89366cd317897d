"""CaptionMedia: what an accepted sample shows, in words, in several styles, as a whole and scene by scene.

each style's instruction -> a first answer -> its statements, of which the verifier leaves some -> what is wrong with it?
what is near-empty, repetitive, boiler-plate, unsupported or no valid JSON -> once more, drawn -> the better of the two
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from infra.telemetry import log
from models import structured
from models.captions import VERSION, sentences, tags, trouble
from models.multimodal import evenly_spaced
from models.scenes import frames_of_scenes
from models.viewer import ViewerRef, load_viewer, name_of
from stages.batch import Batch, jsons, size, texts
from stages.caption_schema import is_valid

INSTRUCTIONS = {
    "short": "Describe this {media} in one sentence.",
    "dense": (
        "Describe this {media} in full detail: every object, its colours, shape, size and position, how it moves, "
        "the background, the light and the camera."
    ),
    "tags": "Which tags describe what this {media} shows? Answer with a list, separated by commas.",
    "structured": "Describe this {media} as JSON that holds to the schema.",
}
"""What the model is asked for each style."""
PLAINLY = " Begin with what is seen, and say nothing else."
"""Added where the first answer was boiler-plate."""
VERIFY = 'Does this {media} show what this description says? Description: "{statement}" Answer Yes or No.'
TEMPERATURE = 0.7
"""Of the second answer."""


@dataclass(frozen=True)
class Draft:
    """A caption: its text, '' if there is none, what is wrong with it, and the mean P(yes) of its statements."""

    text: str
    trouble: str
    supported: float = 0.0

    @property
    def worth(self) -> tuple[bool, bool, float]:
        return (not self.trouble, bool(self.text), self.supported)


@dataclass(frozen=True)
class CaptionMedia:
    """Captions what was accepted. Reads `frames` and, with scenes, `prompt`; adds `captions` and `caption`, the first text of
    the whole. A text is '' where no caption of that style could be had: WriteShards leaves it out, an annotation says so.

    A sample whose plan (`plan_json`, a column of stored samples) has scenes is captioned as a whole, scene 0, and for each.
    """

    model: ViewerRef
    styles: tuple[str, ...] = ("short", "dense")
    max_new_tokens: int = 96
    num_frames: int = 8
    threads: int = 1
    label: str = ""  # the model as the spec names it, recorded with each caption
    schema: str = ""  # JSON, of style `structured`
    verify: float = 0.0  # least P(yes) of a statement; 0 asks nothing
    verifier: ViewerRef | None = None  # None: the model itself
    plan_json: str = "{}"

    name: ClassVar[str] = "caption"
    reads: ClassVar[tuple[str, ...]] = ("frames", "prompt")
    adds: ClassVar[tuple[str, ...]] = ("captions", "caption")
    skips_rejected: ClassVar[bool] = True

    @property
    def settings(self) -> str:
        """All that a caption depends on besides clip and models, as JSON."""
        said = [INSTRUCTIONS, PLAINLY, TEMPERATURE, VERSION]
        verify = [self.verify, VERIFY] if self.verify else []
        form = [self.schema, structured.VERSION] if "structured" in self.styles else ""
        return json.dumps([said, self.max_new_tokens, self.num_frames, form, verify], sort_keys=True)

    def load(self) -> None:
        load_viewer(self.model, self.threads)
        if self.verify:
            load_viewer(self.verifier or self.model, self.threads)

    def __call__(self, batch: Batch) -> Batch:
        label = self.label or name_of(self.model)
        captions: list[list[dict[str, Any]]] = [[] for _ in range(size(batch))]
        missing: list[dict[str, Any]] = []
        groups: dict[int, list[tuple[int, int, np.ndarray]]] = defaultdict(list)
        for row, scene, clip in self._clips(batch):
            groups[len(clip)].append((row, scene, clip))
        for group in groups.values():
            drafts = self._drafts(np.stack([clip for *_, clip in group]))
            for (row, scene, _), draft in zip(group, drafts, strict=True):
                captions[row] += [
                    {"style": style, "language": "en", "scene": scene, "text": draft[style].text, "model": label}
                    for style in self.styles
                ]
                missing += [
                    {"style": style, "scene": scene, "why": draft[style].trouble, **_sample(batch, row)}
                    for style in self.styles
                    if not draft[style].text
                ]
        if missing:
            log().warning("no caption", **missing[0], others=len(missing) - 1)
        for some in captions:
            some.sort(key=lambda item: item["scene"])
        whole = [[item["text"] for item in some if item["scene"] == 0 and item["text"]] for some in captions]
        return batch | {"captions": jsons(captions), "caption": texts([some[0] if some else "" for some in whole])}

    def _clips(self, batch: Batch) -> Iterable[tuple[int, int, np.ndarray]]:
        """Row, scene and frames [t, H, W, 3] of all that is to be captioned."""
        whole = evenly_spaced(batch["frames"], self.num_frames)
        for row in range(size(batch)):
            yield row, 0, whole[row]
            plan = json.loads(batch["plan_json"][row] if "plan_json" in batch else self.plan_json)
            if plan.get("scenes"):
                clip = batch["frames"][row]
                for at, part in enumerate(frames_of_scenes(str(batch["prompt"][row]), len(clip), plan), 1):
                    yield row, at, evenly_spaced(clip[None, part.start : part.stop], self.num_frames)[0]

    def _drafts(self, frames: np.ndarray) -> list[dict[str, Draft]]:
        """A caption in each style of clips uint8 [n, t, H, W, 3]: the first, or the better of two."""
        first = self._write(frames, [dict.fromkeys(self.styles, "")] * len(frames), 0.0)
        again = {
            clip: {style: draft.trouble for style, draft in drafts.items() if draft.trouble}
            for clip, drafts in enumerate(first)
        }
        again = {clip: troubles for clip, troubles in again.items() if troubles}
        if again:
            second = self._write(frames[list(again)], list(again.values()), TEMPERATURE)
            for clip, drafts in zip(again, second, strict=True):
                for style, draft in drafts.items():
                    first[clip][style] = max(first[clip][style], draft, key=lambda each: each.worth)
        return first

    def _write(self, frames: np.ndarray, wanted: list[dict[str, str]], temperature: float) -> list[dict[str, Draft]]:
        """Drafts of the styles wanted of each clip, with what was wrong before."""
        media = "video" if frames.shape[1] > 1 else "image"
        viewer = load_viewer(self.model)
        found: list[dict[str, str]] = [{} for _ in wanted]
        prose = {clip: [style for style in some if style != "structured"] for clip, some in enumerate(wanted)}
        prose = {clip: styles for clip, styles in prose.items() if styles}
        if prose:
            asked = [
                [_instruction(style, media, wanted[clip][style]) for style in styles] for clip, styles in prose.items()
            ]
            answers = viewer.answer(frames[list(prose)], asked, self.max_new_tokens, temperature)
            for (clip, styles), row in zip(prose.items(), answers, strict=True):
                found[clip] |= {style: _kept(style, answer) for style, answer in zip(styles, row, strict=True)}
        if forms := [clip for clip, some in enumerate(wanted) if "structured" in some]:
            instruction, schema = _instruction("structured", media, ""), json.loads(self.schema)
            values = viewer.structured(frames[forms], instruction, schema, self.max_new_tokens, temperature)
            for clip, value in zip(forms, values, strict=True):
                found[clip]["structured"] = self._valid(value)
        return self._verified(frames, found, media)

    def _valid(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False) if is_valid(value, self.schema) else ""

    def _verified(self, frames: np.ndarray, found: list[dict[str, str]], media: str) -> list[dict[str, Draft]]:
        """The texts of each clip, without statements that the verifier does not support."""
        chances: list[dict[str, float]] = [{} for _ in found]
        if self.verify:
            said = [
                list(dict.fromkeys(one for style, text in some.items() for one in statements(style, text)))
                for some in found
            ]
            clips = [clip for clip, some in enumerate(said) if some]
            asked = [[VERIFY.format(media=media, statement=one) for one in said[clip]] for clip in clips]
            p_yes = load_viewer(self.verifier or self.model).p_yes(frames[clips], asked) if clips else ()
            for clip, row in zip(clips, p_yes, strict=True):
                chances[clip] = dict(zip(said[clip], row.tolist(), strict=False))  # rows are filled up
        return [
            {style: self._draft(style, text, chance) for style, text in some.items()}
            for some, chance in zip(found, chances, strict=True)
        ]

    def _draft(self, style: str, text: str, chance: Mapping[str, float]) -> Draft:
        said = statements(style, text) if self.verify else []
        kept = {one for one in said if chance[one] >= self.verify}
        supported = float(np.mean([chance[one] for one in said if one in kept])) if kept else 0.0
        if len(kept) < len(set(said)):
            text = without(style, text, set(said) - kept)
            if not text or (style == "structured" and not is_valid(json.loads(text), self.schema)):
                return Draft("", "unsupported")
        return Draft(text, trouble(style, text), supported)


def statements(style: str, text: str) -> list[str]:
    """What a caption says, one by one: the sentences of prose, each tag, each item of a structured one's lists."""
    if style == "tags":
        return text.split(", ") if text else []
    if style != "structured":
        return sentences(text)
    lists = [value for value in json.loads(text).values() if isinstance(value, list)] if text else []
    return [said for items in lists for item in items if (said := _said(item))]


def without(style: str, text: str, gone: set[str]) -> str:
    """The caption without some of its statements."""
    if style == "structured":
        kept = {
            name: [item for item in value if _said(item) not in gone] if isinstance(value, list) else value
            for name, value in json.loads(text).items()
        }
        return json.dumps(kept, ensure_ascii=False)
    joint = ", " if style == "tags" else " "
    return joint.join(one for one in statements(style, text) if one not in gone)


def _said(item: Any) -> str:
    """A value in words: {"name": "dog", "attributes": ["small"]} is "dog, small"."""
    if isinstance(item, dict | list):
        parts = item.values() if isinstance(item, dict) else item
        return ", ".join(said for part in parts if (said := _said(part)))
    return "" if item is None or isinstance(item, bool) else str(item)


def _kept(style: str, answer: str) -> str:
    return ", ".join(tags(answer)) if style == "tags" else answer


def _instruction(style: str, media: str, wrong: str) -> str:
    return INSTRUCTIONS[style].format(media=media) + (PLAINLY if wrong == "boiler-plate" else "")


def _sample(batch: Batch, row: int) -> dict[str, str]:
    return {"sample_id": str(batch["sample_id"][row])} if "sample_id" in batch else {}
