"""A spec whose judge and captioner are behind an endpoint, looked up: nothing is asked of the endpoint before a sample is."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from infra.errors import UserError
from infra.ray_session import Cluster
from models.endpoint_client import EndpointRef
from models.multimodal import MultimodalRef
from models.vllm import VllmRef
from pipelines import calibrate
from pipelines.annotate_stored import Captioning, Judging
from pipelines.calibrate import Calibration
from pipelines.decisions import NONE
from pipelines.enumeration import planned_batch
from pipelines.placement import place
from pipelines.plan import make_plan
from pipelines.recipes import RECIPES
from pipelines.resolve import Resolved, resolve_spec
from pipelines.spec import Prompts, Spec, parse_spec
from stages.actor import run_stage
from stages.batch import load_json
from stages.caption import CaptionMedia
from stages.decompose import DecomposePrompts
from stages.delivery import paths_of
from stages.judge import JudgeQuality
from stages.vllm_engine import start

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


def judged(spec: Spec, **judge: Any) -> Resolved:
    here = {"backend": "transformers", "model": "pack://tiny", **judge}
    return resolve_spec(parse_spec({**spec.model_dump(mode="json"), "judge": here, "caption": None}))


def test_what_was_asked_says_what_the_facts_of_a_prompt_depend_on(spec: Spec, tiny_pack: Path) -> None:
    code = {"call": "models.pack.decompose:decompose", "version": "1"}
    model = {"model": str(tiny_pack / "expander")}
    others = [
        {},
        {"rubric": ["default", "people"]},
        {"decompose": code},
        {"decompose": code | {"version": "2"}},
        {"decompose": code | {"max_questions": 3}},
        {"decompose": code | {"score": "mean"}},
        {"decompose": model},
        {"decompose": model | {"instruction": "Split {prompt}"}},
        {"decompose": model | {"max_new_tokens": 9}},
    ]
    runs = [judged(spec, **other) for other in others]
    assert len({run.asked for run in runs}) == len(others)
    stricter = judged(spec, decompose=code | {"threshold": 0.9})
    assert stricter.asked == runs[2].asked and stricter.rubric_id != runs[2].rubric_id
    assert stricter.rubric_id == judged(spec, decompose=code, thresholds={"decomposed": 0.9}).rubric_id


def test_prompts_are_decomposed_beside_the_judge_after_what_needs_no_model(spec: Spec, tiny_pack: Path) -> None:
    run = judged(spec, decompose={"model": str(tiny_pack / "expander")})
    stages = run.scoring()
    assert [stage.name for stage in stages] == ["score", "decompose", "judge"]
    decompose = stages[1]
    assert isinstance(decompose, DecomposePrompts) and decompose.cache == run.storage
    assert paths_of(stages) == [str(tiny_pack / "expander"), run.judge.path]  # type: ignore[union-attr]
    assert pickle.loads(pickle.dumps(stages)) == stages and hash(stages[1])
    assert Judging(run).stages() == stages[1:]
    assert str(tiny_pack / "expander") in dict(run.licences)
    far = judged(spec, **NOWHERE, decompose={"model": str(tiny_pack / "expander")})
    assert far.needs_model and not judged(spec, **NOWHERE).needs_model


def test_stored_answers_hold_where_all_that_a_record_is_asked_was_answered(spec: Spec) -> None:
    run = judged(spec, rubric=["default", "prompt_match"])
    names = [question.name for question in run.rubric.questions if not question.takes and question.media != "video"]
    row: dict[str, Any] = {
        "sample_id": "a",
        "verdict": "accepted",
        "reasons": [],
        "judge": run.judge_name,
        "rubric": run.rubric_id,
        "scores": [{"name": name, "value": 0.9} for name in names],
        "num_frames": 1,
        "negative_prompt": "",
        "tags": [],
        "extra_json": "",
    }
    judging = Judging(run)
    assert judging.without_model(row, NONE) == []
    assert judging.without_model(row | {"tags": ["a"]}, NONE) is None, "tags_match was not answered"
    answered = [*row["scores"], {"name": "tags_match", "value": 0.1}]
    (verdict, note) = judging.without_model(row | {"tags": ["a"], "scores": answered}, NONE) or ()
    assert (verdict["value"], note["value"]) == ("rejected", "tags_match 0.10 < 0.5")


def test_what_nothing_is_asked_of_needs_no_model(spec: Spec, tmp_path: Path) -> None:
    (tmp_path / "tags.yaml").write_text("questions: [{name: tagged, text: 'Is it {tags}?'}]")
    judging = Judging(judged(spec, rubric=str(tmp_path / "tags.yaml")))
    row = {"sample_id": "a", "verdict": "rejected", "reasons": ["x"], "judge": "other", "rubric": "r@1+b", "scores": []}
    row |= {"num_frames": 1, "negative_prompt": None, "tags": None, "extra_json": None}
    (verdict,) = judging.without_model(row, NONE) or ()
    assert verdict["value"] == "accepted"


def test_facts_go_with_a_sample_from_its_prompt_to_its_row(spec: Spec, tmp_path: Path) -> None:
    """Through all stages of a run, in this process."""
    code = {"call": "models.pack.decompose:decompose", "version": "1"}
    run = judged(spec, rubric=["default", "prompt_match"], decompose=code)
    run = replace(run, spec=run.spec.model_copy(update={"prompts": Prompts(inline=("a red circle",))}))
    data = planned_batch(calibrate._planned(run, list(calibrate._first(run, 1))), 0, {})
    recipe = RECIPES["synthetic"]
    for stage in (*recipe.generating(run), *recipe.judging(run)):
        stage.load()
        data, _ = run_stage(stage, data)
    (result,) = load_json(data["result"])
    (part,) = (part for part in result["parts"] if part["table"] == "samples")
    (row,) = pq.read_table(io.BytesIO(run.storage.read_bytes(part["path"]))).to_pylist()
    facts = json.loads(row["extra_json"])["decomposed"]
    assert [fact["question"].split('"')[1] for fact in facts] == ["a circle", "a red circle"]
    scores = {item["name"]: item["value"] for item in row["scores"]}
    assert scores["decomposed"] == pytest.approx(min(fact["p_yes"] for fact in facts))
    assert row["rubric"].startswith("default+prompt_match@") and row["rubric"] == run.rubric_id
    assert "tags_match" not in scores and "subjects_match" in scores
    verdict = Judging(run).without_model(row, NONE)
    assert verdict == [], "what it was asked is known, and decided as before"


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"rubric": []}, "judge: rubric: expected at least one of artefacts, "),
        ({"decompose": {}}, "judge.decompose: expected either model, a chat model, or call: 'module:function'"),
        ({"decompose": {"model": "a/b", "call": "c:d"}}, "judge.decompose: expected either model"),
        ({"decompose": {"call": "c:d"}}, "judge.decompose: call needs a version"),
        ({"decompose": {"model": "a/b", "instruction": "x"}}, "judge.decompose: instruction must contain {prompt}"),
        ({"decompose": {"model": "pack://shapes"}}, "judge.decompose: a pack's language model expands prompts"),
        (
            {"backend": "oracle", "decompose": {"model": "a/b"}},
            "judge: decompose is asked of a model, not of backend `oracle`; remove it",
        ),
    ],
)
def test_a_mistake_in_what_is_asked_is_named(judge: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_spec({"prompts": {"inline": ["a"]}, "judge": judge})
    assert str(raised.value).startswith(f"spec: {said}") and "\n" not in str(raised.value)


def test_dropping_tokens_is_part_of_what_was_asked_and_of_no_endpoint(spec: Spec) -> None:
    here = {"backend": "transformers", "model": "pack://tiny"}

    def resolved(**judge: Any) -> Resolved:
        return resolve_spec(parse_spec({**spec.model_dump(mode="json"), "judge": {**here, **judge}, "caption": None}))

    plain, dropping = resolved(), resolved(token_drop=0.01)
    assert isinstance(dropping.judge, MultimodalRef) and dropping.judge.token_drop == 0.01
    assert plain.asked == resolved(token_drop=0).asked != dropping.asked
    with pytest.raises(UserError, match=r"judge: .*token_drop belongs to backend `transformers`; remove it"):
        parse_spec({**spec.model_dump(mode="json"), "judge": {**NOWHERE, "token_drop": 0.01}})


def test_captions_are_known_by_all_that_changes_them(
    spec: Spec, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        {"styles": ["structured"]},
        {"styles": ["structured"], "json_schema": str(form)},
        {"verify": 0.5},
        {"verify": 0.6},
        {"verify": 0.5, "judge": NOWHERE},
        {"verify": 0.5, "judge": {**here, "token_drop": 0.01}},
    ]
    found = [captions(**change) for change in changes]
    assert len(set(found)) == len(changes)
    assert captions() == captions(styles=["tags"]) == captions(judge=NOWHERE), "a style is the same beside another one"
    assert captions() == captions(json_schema=str(form)), "nothing is held to the schema"
    assert captions(verify=0.5) == captions(judge={"backend": "oracle"}, verify=0.5), "the captioner verifies itself"
    assert all(each.startswith("captions@") for each in found)
    monkeypatch.setattr("models.structured.VERSION", "other")
    assert captions() == found[0] and captions(styles=["structured"]) not in found


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


def test_vllm_holds_a_gpu_and_its_models_go_to_each_node(spec: Spec, tiny_pack: Path) -> None:
    vllm = {"backend": "vllm", "model": "pack://tiny"}

    def resolved(judge: dict[str, Any], **caption: Any) -> Resolved:
        sections = {"judge": judge, "caption": {**vllm, **caption}}
        return resolve_spec(parse_spec({**spec.model_dump(mode="json"), **sections}))

    run = resolved({**vllm, "screen": {**vllm, "max_model_len": 512}, "decompose": None})
    folder = str(tiny_pack / "judge")
    assert run.judge == run.captioner == VllmRef(folder, start), "one engine serves both"
    assert run.screen == VllmRef(folder, start, max_model_len=512)
    assert [ref.section for ref in (run.judge, run.screen, run.captioner)] == ["judge", "judge.screen", "caption"]
    assert run.needs_model and paths_of((*run.scoring(), *run.captioning())) == [folder]
    assert pickle.loads(pickle.dumps(run.scoring())) == run.scoring()
    here = {"backend": "transformers"}
    assert resolved(vllm).judge_name == resolved({**vllm, **here}).judge_name, "the same model, the same answers"
    assert run.captions_id == resolved(vllm, **here).captions_id
    guided, filled = (resolved(vllm, **each, styles=["structured"]).captions_id for each in ({}, here))
    assert guided != filled, "one is written, the other filled in leaf by leaf"


def test_a_plan_starts_no_vllm(spec: Spec) -> None:
    vllm = {"backend": "vllm", "model": "pack://tiny"}
    plan = make_plan(parse_spec({**spec.model_dump(mode="json"), "judge": vllm, "caption": vllm}))
    assert plan.estimate is not None


@pytest.mark.parametrize("model", ["/nope", "pack://nope", "memory://nope"])
@pytest.mark.parametrize("key", ["judge.model", "judge.screen.model", "caption.model"])
def test_a_model_that_is_not_there_is_named_by_its_own_key(spec: Spec, key: str, model: str) -> None:
    here: dict[str, Any] = {"model": "pack://tiny"}
    sections = {"judge": {**here, "screen": here}, "caption": here}
    sections |= {
        "judge.model": {"judge": {**here, "model": model}},
        "judge.screen.model": {"judge": {**here, "screen": {"model": model}}},
        "caption.model": {"caption": {"model": model}},
    }[key]
    with pytest.raises(UserError, match=rf"^{key}: ") as caught:
        resolve_spec(parse_spec({**spec.model_dump(mode="json"), **sections}))
    assert "nope" in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_schema_is_the_specs_mistake(spec: Spec, tmp_path: Any) -> None:
    form = tmp_path / "form.json"
    form.write_text('{"type": "array"}')
    caption = {"model": "pack://tiny", "styles": ["structured"], "json_schema": str(form)}
    with pytest.raises(UserError, match=r"^caption.json_schema: .*form.json"):
        resolve_spec(parse_spec({**spec.model_dump(mode="json"), "caption": caption}))
