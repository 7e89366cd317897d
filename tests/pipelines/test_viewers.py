"""A spec whose judge and captioner are behind an endpoint, looked up: nothing is asked of the endpoint before a sample is."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from infra.errors import UserError
from infra.ray_session import Cluster
from models.endpoint_client import EndpointRef
from models.multimodal import MultimodalRef
from pipelines import calibrate
from pipelines.annotate_stored import Captioning, Judging
from pipelines.calibrate import Calibration
from pipelines.placement import place
from pipelines.plan import make_plan
from pipelines.recipes import RECIPES
from pipelines.resolve import Resolved, resolve_spec
from pipelines.spec import Spec, parse_spec
from stages.caption import CaptionMedia
from stages.delivery import paths_of
from stages.judge import JudgeQuality

NOWHERE = {"backend": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "org/looker", "max_requests": 7}


@pytest.fixture
def spec(tmp_path: Any) -> Spec:
    data = {
        "prompts": {"inline": ["a red cat"]},
        "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
        "generators": [{"model": "pack://tiny"}],
        "sampler": {"num_inference_steps": 2},
        "layout": {"batch_size": 1},
        "judge": NOWHERE,
        "caption": {**NOWHERE, "timeout": 5},
        "output": {"uri": str(tmp_path / "dataset")},
    }
    return parse_spec(data)


@pytest.fixture
def run(spec: Spec) -> Resolved:
    return resolve_spec(spec)


def test_a_row_says_which_model_and_host(run: Resolved) -> None:
    assert run.judge_name == run.captioner_name == "org/looker@127.0.0.1:9"
    assert Judging(run).annotator.name == Captioning(run).annotator.name == run.judge_name
    assert dict(run.licences)[run.judge_name].may_train == "unknown"


def test_stages_ask_the_endpoint_and_keep_answers_in_the_dataset(run: Resolved) -> None:
    judge, caption = Judging(run).stages()[-1], Captioning(run).stages()[0]
    assert isinstance(judge, JudgeQuality) and isinstance(caption, CaptionMedia)
    assert judge.model == EndpointRef(
        "http://127.0.0.1:9/v1", "org/looker", max_requests=7, cache=run.storage, section="judge"
    )
    assert caption.model == replace(judge.model, timeout=5, section="caption")
    assert caption.label == run.captioner_name
    assert pickle.loads(pickle.dumps((judge, caption))) == (judge, caption)
    assert paths_of((judge, caption)) == [], "no file of it is to be sent to a node"


def test_stages_of_an_endpoint_hold_no_gpu(run: Resolved) -> None:
    recipe = RECIPES["synthetic"]
    stages = recipe.generating(run), recipe.judging(run)
    _, judging = place(*stages, Cluster(16, 4), run.spec.compute, run.needs_model)
    assert (judging.name, judging.num_gpus) == ("judge", 0)
    here = resolve_spec(
        run.spec.model_copy(update={"caption": run.spec.caption.model_validate({"model": "pack://tiny"})})
    )
    assert here.needs_model


def test_a_plan_asks_nothing_of_the_endpoint(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Calibration | None] = []
    measure = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda run: found.append(measure(run)) or found[0])
    plan = make_plan(spec)
    assert plan.estimate is not None and plan.missing == ()
    (measured,) = found
    assert measured is not None
    assert {"sample", "score", "write"} <= set(measured.stage_seconds)
    assert not {"judge", "caption"} & set(measured.stage_seconds)


def test_dropping_tokens_is_part_of_what_was_asked_and_of_no_endpoint(spec: Spec) -> None:
    here = {"backend": "transformers", "model": "pack://tiny"}

    def resolved(**judge: Any) -> Resolved:
        return resolve_spec(parse_spec({**spec.model_dump(mode="json"), "judge": {**here, **judge}, "caption": None}))

    plain, dropping = resolved(), resolved(token_drop=0.01)
    assert isinstance(dropping.judge, MultimodalRef) and dropping.judge.token_drop == 0.01
    assert plain.asked == resolved(token_drop=0).asked != dropping.asked
    with pytest.raises(UserError, match=r"judge: .*token_drop belongs to backend `transformers`; remove it"):
        parse_spec({**spec.model_dump(mode="json"), "judge": {**NOWHERE, "token_drop": 0.01}})


def test_captions_are_known_by_all_that_changes_them(spec: Spec, tmp_path: Any) -> None:
    here = {"backend": "transformers", "model": "pack://tiny"}
    form = tmp_path / "form.json"
    form.write_text('{"type": "object", "properties": {"sky": {"type": "string"}}}')

    def captions(judge: Any = here, **caption: Any) -> str:
        data = {**spec.model_dump(mode="json"), "judge": judge, "caption": {**here, **caption}}
        return resolve_spec(parse_spec(data)).captions_id

    changes: list[dict[str, Any]] = [
        {},
        {"max_new_tokens": 95},
        {"num_frames": 7},
        {"token_drop": 0.01},
        {"json_schema": str(form)},
        {"verify": 0.5},
        {"verify": 0.6},
        {"verify": 0.5, "judge": NOWHERE},
        {"verify": 0.5, "judge": {**here, "token_drop": 0.01}},
    ]
    found = [captions(**change) for change in changes]
    assert len(set(found)) == len(changes)
    assert captions() == captions(styles=["tags"]) == captions(judge=NOWHERE), "a style is the same beside another one"
    assert captions(verify=0.5) == captions(judge={"backend": "oracle"}, verify=0.5), "the captioner verifies itself"
    assert all(each.startswith("captions@") for each in found)


def test_the_judge_verifies_where_it_is_a_model(spec: Spec) -> None:
    def verifier(judge: Any, **caption: Any) -> Any:
        data = {**spec.model_dump(mode="json"), "judge": judge, "caption": {"model": "pack://tiny", **caption}}
        (stage,) = resolve_spec(parse_spec(data)).captioning()
        assert isinstance(stage, CaptionMedia)
        return stage.verifier

    assert isinstance(verifier(NOWHERE, verify=0.5), EndpointRef)
    assert isinstance(verifier({"model": "pack://tiny"}, verify=0.5), MultimodalRef)
    assert verifier({"backend": "oracle"}, verify=0.5) is None
    assert verifier(NOWHERE) is None


def test_a_broken_schema_is_the_specs_mistake(spec: Spec, tmp_path: Any) -> None:
    form = tmp_path / "form.json"
    form.write_text('{"type": "array"}')
    caption = {"model": "pack://tiny", "styles": ["structured"], "json_schema": str(form)}
    with pytest.raises(UserError, match=r"^caption.json_schema: .*form.json"):
        resolve_spec(parse_spec({**spec.model_dump(mode="json"), "caption": caption}))
