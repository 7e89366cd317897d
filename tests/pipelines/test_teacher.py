"""generators[].teacher_steps: from the spec to the row, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.storage import Storage
from infra.tables import Table
from models.source import content_sha256
from pipelines.calibrate import calibrate
from pipelines.plan import make_plan
from pipelines.regenerate import regenerate
from pipelines.resolve import resolve_spec
from pipelines.spec import parse_spec
from pipelines.verify import verify

SAMPLER = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16}
HANDED = {"teacher": "pack://tiny", "teacher_steps": 1, "teacher_guidance_scale": 3.0}


@pytest.fixture(scope="module")
def student(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pack's generator with another denoiser."""
    from diffusers import WanTransformer3DModel

    from models.pack.tiny import fill_weights

    folder = Path(shutil.copytree(tiny_pack / "generator", tmp_path_factory.mktemp("student") / "wan"))
    denoiser = WanTransformer3DModel.from_pretrained(folder / "transformer")
    fill_weights(denoiser, "student")
    denoiser.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture
def resolved(tmp_path: Path) -> Callable[..., Any]:
    """The spec of one generator, resolved; `sections` are more of it."""

    def resolve(generator: dict[str, Any], **sections: Any) -> Any:
        spec = {
            "prompts": {"inline": ["a red cat", "a blue dog"]},
            "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
            "generators": [generator],
            "sampler": SAMPLER,
            "layout": {"batch_size": 2},
            "judge": {"backend": "none"},
            "caption": None,
            "output": {"uri": str(tmp_path / "dataset")},
        }
        return resolve_spec(parse_spec(spec | sections))

    return resolve


def test_an_id_follows_teacher_steps_and_guidance_and_nothing_else(
    student: Path, tiny_pack: Path, resolved: Callable[..., Any]
) -> None:
    def id_of(**keys: Any) -> str:
        return str(resolved({"model": str(student), **keys}).generator_ids[0])

    plain, handed = id_of(), id_of(**HANDED)
    assert id_of(**{**HANDED, "teacher_steps": 0}) == plain
    assert id_of(**{**HANDED, "teacher": str(tiny_pack / "generator")}) == handed  # by content
    others = [{"teacher_steps": 2}, {"teacher_guidance_scale": 2.0}, {"teacher": str(student)}]
    assert len({plain, handed, *(id_of(**HANDED | change) for change in others)}) == 5


def test_the_students_record_says_what_the_spec_leaves_out(
    student: Path, tiny_pack: Path, tmp_path: Path, resolved: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    record = {"teacher": "pack://tiny", "teacher_guidance_scale": 3}
    (folder / "ditmill.json").write_text(json.dumps(record))
    run = resolved({"model": str(folder), "teacher_steps": 1})
    told = run.generators[0].teacher
    assert (told.model, told.steps, told.guidance_scale) == ("pack://tiny", 1, 3.0)
    assert told.sha256 == content_sha256(told.path) == content_sha256(str(tiny_pack / "generator"))
    assert run.generator_ids == resolved({"model": str(student), **HANDED}).generator_ids  # a record is no content
    said = resolved({"model": str(folder), "teacher_steps": 1, "teacher_guidance_scale": 2})
    assert said.generators[0].teacher.guidance_scale == 2.0
    assert {model for model, _ in run.licences} == {"pack://tiny", str(folder)}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, r"^generators\.0\.teacher: left out, and .* has no ditmill\.json that says teacher; "),
        ("{", r"^generators\.0\.teacher: .*ditmill\.json cannot be read"),
        ('{"teacher": 1}', r"^generators\.0\.teacher: left out"),
        ('{"teacher": "pack://tiny"}', r"^generators\.0\.teacher_guidance_scale: left out"),
        ('{"teacher": "/no/such", "teacher_guidance_scale": 2}', r"^generators\.0\.teacher: /no/such does not exist"),
        (
            '{"teacher": "s3://elsewhere/wan", "teacher_guidance_scale": 2}',
            r"^generators\.0\.teacher: s3://elsewhere/wan is outside of policy\.buckets",
        ),
    ],
)
def test_a_teacher_that_nobody_names_or_may_not_is_one_clear_line(
    record: str | None, words: str, student: Path, tmp_path: Path, resolved: Callable[..., Any]
) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    if record is not None:
        (folder / "ditmill.json").write_text(record)
    with pytest.raises(UserError, match=words) as error:
        resolved({"model": str(folder), "teacher_steps": 1}, policy={"buckets": ["ours"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"sampler": {**SAMPLER, "guidance_scale": 3.0}}, r"^sampler\.guidance_scale: with generators\.teacher_steps"),
        ({"sampler": {**SAMPLER, "num_inference_steps": 1}}, r"^generators\.teacher_steps: found 2"),
        ({"sampler": {**SAMPLER, "dualparal": {"frames": 2, "context": 1}}}, r"^sampler\.dualparal: "),
        ({"layout": {"parallel": {"ulysses": 2}}}, r"^layout\.parallel: not with generators\.teacher_steps"),
        ({"layout": {"offload": "model"}}, r"^layout\.offload: "),
    ],
)
def test_what_two_models_cannot_share_is_refused(
    sections: dict[str, Any], words: str, student: Path, resolved: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=words):
        resolved({"model": str(student), **HANDED, "teacher_steps": 2}, **sections)


def test_another_family_is_refused_with_the_reason(tiny_image_to_video: str, resolved: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"^generators\.0\.teacher: .* is a WanImageToVideoPipeline, and only"):
        resolved({"model": tiny_image_to_video, **HANDED})


def test_a_plan_counts_the_evaluations_of_both(student: Path, resolved: Callable[..., Any]) -> None:
    run = resolved({"model": str(student), **HANDED}, sampler={**SAMPLER, "num_inference_steps": 5})
    measured = calibrate(run)
    assert measured is not None and measured.nfe == 2 + 4


@pytest.mark.parametrize("recorded", [False, True])
def test_a_teacher_that_is_not_here_is_missing_in_the_plan(recorded: bool, student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(student, tmp_path / "student"))
    keys = {**HANDED, "teacher": "nobody/wan"}
    if recorded:
        (folder / "ditmill.json").write_text(json.dumps({"teacher": keys.pop("teacher")}))
    spec = parse_spec(
        {
            "prompts": {"inline": ["a cat"]},
            "generators": [{"model": str(folder), **keys}],
            "judge": {"backend": "none"},
            "caption": None,
            "output": {"uri": str(tmp_path / "dataset")},
        }
    )
    assert make_plan(spec).missing == ("nobody/wan",)


def test_a_dataset_by_two_models_is_whole_and_each_sample_made_again(
    student: Path, generate_from: Callable[..., Path]
) -> None:
    root = generate_from(generators=[{"model": str(student), **HANDED}], sampler=SAMPLER)
    storage = Storage(str(root))
    assert list(map(str, verify(storage))) == []
    rows = Table(storage, "samples").read().to_pylist()
    assert {row["nfe"] for row in rows} == {3}
    told = {json.dumps(json.loads(row["plan_json"])["teacher"], sort_keys=True) for row in rows}
    assert [json.loads(each)["steps"] for each in told] == [1]
    assert regenerate(storage, rows[0]["sample_id"]).latents == "same"
