from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.kept import kept_states
from pipelines.plan import make_plan, render
from pipelines.records import unique_records
from pipelines.sizes import known_shape, sample_bytes
from pipelines.spec import Spec, load_spec
from stages.rubric import load_rubric

REPO = Path(__file__).parents[2]
EXAMPLES = sorted((REPO / "pipelines" / "examples").glob("*.yaml"))
OFFLINE = {"quickstart", "images", "reflow", "curate"}
DISTILLATION = {"reflow", "accvideo-trajectory", "causvid-ode"}
IN_A_BUCKET = {"wan-1.3b-cluster"}
"""Whose prompts lie in the reader's own."""
WITHOUT_PROMPTS = {"curate"}


@pytest.fixture(autouse=True)
def _at_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request: pytest.FixtureRequest) -> tuple[str, Spec]:
    return request.param.stem, load_spec(request.param)


def test_examples_are_the_ones_the_docs_name() -> None:
    expected = {"quickstart", "images", "wan-1.3b", "wan-1.3b-cluster", "wan-i2v", "flux"}
    assert {path.stem for path in EXAMPLES} == expected | DISTILLATION | WITHOUT_PROMPTS


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in IN_A_BUCKET | WITHOUT_PROMPTS], ids=lambda path: path.stem
)
def test_example_reads_all_of_its_prompts(path: Path) -> None:
    records = list(unique_records(load_spec(path)))
    assert records
    assert not [record.prompt for record in records if record.is_bad]


def test_example_asks_the_rubric_only_what_it_has(example: tuple[str, Spec]) -> None:
    _, spec = example
    assert set(spec.judge.thresholds) <= {question.name for question in load_rubric(spec.judge.rubric).questions}


def test_example_names_models_of_its_kind(example: tuple[str, Spec]) -> None:
    name, spec = example
    models = [generator.model for generator in spec.generators]
    models += [spec.judge.model] if spec.judge.backend == "transformers" else []
    models += [section.model for section in (spec.caption, spec.prompts.expand) if section]
    assert all(model.startswith("pack://") == (name in OFFLINE) for model in models)


def test_example_shapes_suit_wan_s_compression(example: tuple[str, Spec]) -> None:
    """Wan's autoencoder takes 4k+1 frames; every family here wants sides that are multiples of 16."""
    _, spec = example
    for bucket in spec.buckets:
        assert (bucket.num_frames - 1) % 4 == 0
        assert bucket.height % 16 == bucket.width % 16 == 0


def test_example_says_how_it_is_run(example: tuple[str, Spec]) -> None:
    name, _ = example
    head = (REPO / "pipelines" / "examples" / f"{name}.yaml").read_text(encoding="utf-8").partition("\nname:")[0]
    assert f"ditmill run pipelines/examples/{name}.yaml" in " ".join(head.split())


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("quickstart", 40),  # 20 prompts, each as it is and rewritten
        ("images", 40),  # 20 prompts, twice
        ("wan-1.3b", 120),  # 20 prompts, each as it is and rewritten twice, twice
        ("wan-1.3b-cluster", 20),
        ("wan-i2v", 8),  # 2 frames, four times
        ("flux", 80),
        ("reflow", 80),  # 20 prompts, four times
        ("accvideo-trajectory", 20),
        ("causvid-ode", 20),
    ],
)
def test_example_is_planned_without_weights(name: str, samples: int, tmp_path: Path) -> None:
    here = [f"output.uri={tmp_path}/dataset", "prompts.path=pipelines/examples/prompts.jsonl"]
    if name == "wan-i2v":
        here.pop()
    plan = make_plan(load_spec(REPO / "pipelines" / "examples" / f"{name}.yaml", here), calibrate=False)
    assert plan.planned == samples
    assert bool(plan.missing) == (name not in OFFLINE)
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("name", "changes", "places", "steps", "nbytes"),
    [
        ("causvid-ode", [], (0, 36, 44, 50), 50, 16.8e6),
        (
            "causvid-ode",
            ["sampler.num_inference_steps=48", "trajectory.keep=[0,12,24,36,-1]"],
            (0, 12, 24, 36, 48),
            48,
            21.0e6,
        ),
        ("accvideo-trajectory", [], (0, 10, 20, 30, 40, 50), 50, 25.2e6),
    ],
)
def test_examples_for_distillation_keep_the_states_of_their_papers(name, changes, places, steps, nbytes) -> None:
    spec = load_spec(REPO / "pipelines" / "examples" / f"{name}.yaml", changes)
    states = kept_states(spec)
    assert states is not None and (states.places, spec.sampler.num_inference_steps) == (places, steps)
    shape = known_shape(spec, spec.buckets[0])
    assert shape is not None
    assert sample_bytes(spec, shape)["trajectory"] == pytest.approx(nbytes, rel=0.005)


def test_bytes_of_wan_at_480p_are_those_that_are_known() -> None:
    """[16, 21, 60, 104]: 4.19 MB a latent in float16, 411 MB for the 49 states of 48 steps in float32."""
    changes = ["sampler.num_inference_steps=48", "trajectory.keep=all", "trajectory.dtype=float32"]
    changes.append("output.tensors={latents: float16, text_embeddings: float16}")
    spec = load_spec(REPO / "pipelines" / "examples" / "causvid-ode.yaml", changes)
    shape = known_shape(spec, spec.buckets[0])
    assert shape == (16, 21, 60, 104)
    found = sample_bytes(spec, shape)
    assert round(found["latents"] / 1e6, 2) == 4.19 and round(found["trajectory"] / 1e6) == 411


def test_a_plan_without_the_model_says_how_many_bytes_it_takes() -> None:
    plan = make_plan(load_spec(REPO / "pipelines" / "examples" / "causvid-ode.yaml"), calibrate=False)
    assert plan.nbytes == {"trajectory": pytest.approx(20 * 16.77e6, rel=0.001)}
    assert "bytes, if all are accepted: 335 MB (trajectory 335 MB)" in render(plan, "causvid-ode")
