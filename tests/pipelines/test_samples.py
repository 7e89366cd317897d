"""What the recipes for distillation store, and how it is read back: by the stages, in this process and without Ray."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from infra.commit import Committer, write_part
from infra.control import uncommitted_files
from infra.errors import UserError
from infra.schema import EMBEDDINGS
from infra.storage import Storage
from infra.tables import Table, read_dataset_json
from infra.vacuum import vacuum
from models.generator import GeneratorRef, load_generator
from models.noise import standard_normal
from models.path import Path as States
from models.plan import SamplerPlan
from models.source import resolve
from models.text import padded_text
from pipelines.card import RECIPES, write_card
from pipelines.export import export
from pipelines.plan import make_plan, render
from pipelines.regenerate import regenerate
from pipelines.release import release
from pipelines.report import build_report
from pipelines.resolve import resolve_spec
from pipelines.run import check_dataset
from pipelines.samples import read_samples
from pipelines.spec import parse_spec
from pipelines.verify import verify

TINY = {"model": "pack://tiny"}
OPEN = {"judge": {"backend": "none"}, "score": {"reject_static": False, "reject_duplicates": False}, "caption": None}
KEPT = {"keep_rejected": "none"}
STEPS = 4
SECTIONS: dict[str, dict[str, Any]] = {
    "reflow": {"recipe": "reflow", "output": {**KEPT, "tensors": {"latents": "float32", "text_embeddings": "float32"}}},
    "trajectory": {
        "recipe": "trajectory",
        "trajectory": {"keep": [0, 1, -2, -1], "dtype": "float32"},
        "output": {**KEPT, "tensors": {"text_embeddings": "float32"}},
    },
    "prompts": {"recipe": "prompts", "output": {**KEPT, "compression": "zstd"}},
}


@pytest.fixture(scope="session")
def made(generate_from: Callable[..., Path]) -> Callable[[str], Path]:
    """Makes a dataset of a recipe, once."""
    known: dict[str, Path] = {}

    def build(recipe: str) -> Path:
        if recipe not in known:
            sampler = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
            known[recipe] = generate_from(sampler=sampler, **OPEN, **SECTIONS[recipe])
        return known[recipe]

    return build


@pytest.fixture
def dataset_of(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Storage]:
    """A copy of it."""

    def copy(recipe: str) -> Storage:
        return Storage(str(shutil.copytree(made(recipe), tmp_path / recipe)))

    return copy


def rows(storage: Storage, table: str) -> list[dict[str, Any]]:
    return Table(storage, table).read().to_pylist()


def sampled(row: dict[str, Any], tiny_pack: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All states of a row's path, sampled here in a batch of its size, and its conditions."""
    generator = load_generator(GeneratorRef(str(tiny_pack / "generator")))
    plan = SamplerPlan.from_dict(json.loads(row["plan_json"])["plan"])
    conditions = generator.encode([row["prompt"]] * 3, [row["negative_prompt"]] * 3, [], plan)
    shape = (row["height"], row["width"], row["num_frames"])
    noise = np.stack([standard_normal(row["noise_key"], generator.latent_shape(*shape))] * 3)
    path = States(range(STEPS + 1), STEPS)
    generator.sample(conditions, noise, plan, *shape, row["fps"], path)
    return path.states[0], {name: value[0] for name, value in conditions.items()}


@pytest.mark.parametrize("recipe", SECTIONS)
def test_a_dataset_of_each_recipe_verifies(recipe, dataset_of):
    storage = dataset_of(recipe)
    assert [str(finding) for finding in verify(storage)] == []
    assert len(rows(storage, "samples")) == 6 and not rows(storage, "failures")
    assert uncommitted_files(storage) == [] and vacuum(storage, older_than=0.0) == []


def test_reflow_keeps_the_noise_as_its_key(dataset_of, tiny_pack):
    storage = dataset_of("reflow")
    release(storage, "r1")
    for sample in read_samples(storage, "r1"):
        said = json.loads(sample.row["extra_json"])
        noise = sample.noise()
        assert said["noise_sha256"] == hashlib.sha256(noise.tobytes()).hexdigest()
        assert [item["role"] for item in sample.row["tensors"]] == ["latents"]
        assert sample.latents().shape == noise.shape
        with pytest.raises(UserError, match="trajectory are not stored"):
            sample.trajectory()
    states, _ = sampled(dict(sample.row), tiny_pack)
    np.testing.assert_array_equal(states[0], noise)
    np.testing.assert_array_equal(states[-1], sample.latents())
    facts = json.loads(sample.row["plan_json"])
    for key in ("scheduler", "sigmas", "timesteps", "shift", "guidance", "guidance_scale", "latent_layout", "dtype"):
        assert facts[key] is not None
    assert facts["latents"]["scaling"] and facts["latents"]["std"]


def test_noise_is_a_tensor_where_it_is_asked_for(generate_from):
    tensors = {"latents": "bfloat16", "noise": "float32"}
    output = {**KEPT, "tensors": tensors, "compression": "zstd"}
    storage = Storage(str(generate_from(**OPEN, recipe="reflow", output=output)))
    release(storage, "r1", pack_bytes=1 << 20)
    for sample in read_samples(storage, "r1"):
        members = {item["role"]: item["member"] for item in sample.row["tensors"]}
        sample_id = sample.row["sample_id"]
        assert members == {
            "latents": f"{sample_id}.safetensors.zst",
            "noise": f"{sample_id}.noise.safetensors.zst",
        }
        np.testing.assert_array_equal(sample._array("noise"), sample.noise())
        with pytest.raises(UserError, match="text_embeddings are not stored"):
            sample.text()
    assert not Table(storage, "embeddings").files() and [*verify(storage)] == []


def test_trajectory_keeps_the_states_that_were_asked_for(dataset_of, tiny_pack):
    storage = dataset_of("trajectory")
    release(storage, "r1", pack_bytes=1 << 20)
    for sample in read_samples(storage, "r1"):
        path = sample.trajectory()
        facts = json.loads(sample.row["plan_json"])
        assert (path.places, path.steps) == ((0, 1, 3, 4), STEPS)
        assert path.timesteps == (*(facts["timesteps"][place] for place in (0, 1, 3)), 0.0)
        assert path.sigmas == tuple(facts["sigmas"][place] for place in path.places) and path.sigmas[-1] == 0.0
        states, _ = sampled(dict(sample.row), tiny_pack)
        np.testing.assert_array_equal(path.states, states[list(path.places)])
        np.testing.assert_array_equal(sample.latents(), states[-1])
        np.testing.assert_array_equal(sample.noise(), states[0])
        said = json.loads(sample.row["extra_json"])["trajectory"]
        assert (said["convention"], said["keep"]) == ("before", [0, 1, -2, -1])


def test_the_convention_of_the_user_changes_names_and_no_state(generate_from, dataset_of):
    after = {"keep": [0, -2, -1], "convention": "after", "dtype": "float16"}
    sections = {**SECTIONS["trajectory"], "trajectory": after}
    sampler = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    mine, other = Storage(str(generate_from(sampler=sampler, **OPEN, **sections))), dataset_of("trajectory")
    for storage in (mine, other):
        release(storage, "r1")
    theirs = {sample.row["sample_id"]: sample.trajectory() for sample in read_samples(other, "r1")}
    for sample in read_samples(mine, "r1"):
        path, known = sample.trajectory(), theirs.pop(sample.row["sample_id"])
        assert path.places == (1, 3, 4)
        np.testing.assert_array_equal(path.states, known.states[1:].astype(np.float16))
        assert (path.timesteps, path.sigmas) == (known.timesteps[1:], known.sigmas[1:])
    assert not theirs


def test_texts_are_kept_once_and_unpadded(dataset_of, tiny_pack):
    storage = dataset_of("trajectory")
    release(storage, "r1")
    kept = rows(storage, "embeddings")
    assert sorted(row["text"] for row in kept if not row["negative"]) == sorted(
        {row["prompt"] for row in rows(storage, "samples")}
    )
    assert [row["text"] for row in kept if row["negative"]] == [""]
    for sample in read_samples(storage, "r1"):
        _, conditions = sampled(dict(sample.row), tiny_pack)
        for prefix, text in (("", sample.text()), ("negative_", sample.negative_text())):
            assert set(text) == {"prompt_embeds"}
            whole = conditions[f"{prefix}prompt_embeds"]
            assert 0 < len(text["prompt_embeds"]) < len(whole)
            np.testing.assert_array_equal(padded_text(text, len(whole))["prompt_embeds"], whole)


def test_prompts_are_rows_without_media(dataset_of):
    storage = dataset_of("prompts")
    release(storage, "r1", pack_bytes=1 << 20)
    found = list(read_samples(storage, "r1"))
    assert len(found) == 6 and {sample.row["verdict"] for sample in found} == {"accepted"}
    for sample in found:
        assert sample.text()["prompt_embeds"].dtype == np.float32 and not sample.row["media"]
        with pytest.raises(UserError, match="has no media"):
            sample.media()
        with pytest.raises(UserError, match="has no latents"):
            sample.noise()
    page = Path(build_report(storage, sheet=False).path).read_text()
    assert page.count('class="media empty"') == 6 and "ScoreMedia" not in page


@pytest.mark.parametrize("recipe", SECTIONS)
def test_a_sample_is_made_again_with_its_states_and_texts(recipe, dataset_of):
    storage = dataset_of(recipe)
    again = regenerate(storage, rows(storage, "samples")[0]["sample_id"])
    kept = {"reflow": ("same", "same", "not stored"), "trajectory": ("same", "not stored", "same")}
    media, latents, trajectory = kept.get(recipe, ("not stored",) * 3)
    assert (again.media, again.latents, again.trajectory, again.text) == (media, latents, trajectory, "same")


def test_readers_share_a_release_and_leave_out_an_older_one(dataset_of):
    storage = dataset_of("reflow")
    some = sorted(row["sample_id"] for row in rows(storage, "samples"))[:2]
    release(storage, "old", where=f"sample_id in ('{some[0]}', '{some[1]}')")
    release(storage, "new")
    whole = [sample.row["sample_id"] for sample in read_samples(storage, "new")]
    shares = [[sample.row["sample_id"] for sample in read_samples(storage, "new", rank=at, world=4)] for at in range(4)]
    assert shares == [whole[at::4] for at in range(4)]
    later = [sample.row["sample_id"] for sample in read_samples(storage, "new", since=("old",))]
    assert later == [one for one in whole if one not in some]
    with pytest.raises(UserError, match="has no such release"):
        next(read_samples(storage, "none"))


def test_media_and_tensors_that_changed_are_not_handed_out(dataset_of):
    storage = dataset_of("reflow")
    release(storage, "r1")
    sample = next(read_samples(storage, "r1"))
    assert sample.media()[1] == "mp4"
    item = sample.row["tensors"][0]
    file = Path(storage.path(item["shard"]))
    data = bytearray(file.read_bytes())
    data[item["offset"] + item["nbytes"] - 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="do not have the recorded sha256"):
        sample.latents()


def rewritten(storage: Storage, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace the parts of a table on disk, as who tampers with them would."""
    import pyarrow.parquet as pq

    for name in Table(storage, table).files():
        path = storage.path(name)
        pq.write_table(change(pq.read_table(path)), path)


def test_verify_finds_noise_and_texts_that_are_not_as_recorded(dataset_of):
    storage = dataset_of("trajectory")
    target = rows(storage, "samples")[0]

    def spoil(part: pa.Table) -> pa.Table:
        extra = [
            json.dumps(json.loads(text) | {"noise_sha256": "00" * 32, "text_id": "ab" * 16})
            if sample_id == target["sample_id"]
            else text
            for sample_id, text in zip(part["sample_id"].to_pylist(), part["extra_json"].to_pylist(), strict=True)
        ]
        return part.set_column(part.schema.get_field_index("extra_json"), "extra_json", pa.array(extra))

    rewritten(storage, "samples", spoil)
    found = {(finding.kind, finding.where) for finding in verify(storage)}
    assert found == {("noise_changed", target["sample_id"]), ("text_missing", target["sample_id"])}


def test_verify_reads_the_files_of_texts(dataset_of):
    storage = dataset_of("prompts")
    (shard,) = {row["tensors"][0]["shard"] for row in rows(storage, "embeddings")[:1]}
    Path(storage.path(shard)).unlink()
    assert {finding.kind for finding in verify(storage)} == {"shard_missing"}


def test_a_text_that_two_runs_wrote_is_committed_once(dataset_of):
    storage = dataset_of("prompts")
    found = rows(storage, "embeddings")
    twice = pa.Table.from_pylist(found, EMBEDDINGS)
    committer = Committer(Table(storage, "embeddings"), "later", knows_all=True)
    new = twice.slice(0, 1).set_column(0, "text_id", pa.array(["ef" * 16]))
    part = write_part(storage, "embeddings/later-0.parquet", pa.concat_tables([twice, new]).cast(twice.schema))
    assert committer.commit([part]).rows == 1
    ids = [row["text_id"] for row in rows(storage, "embeddings")]
    assert len(ids) == len(set(ids)) == len(found) + 1


def test_dataset_json_fixes_which_states_are_kept(dataset_of):
    storage = dataset_of("trajectory")
    said = read_dataset_json(storage)
    assert (said["recipe"], said["trajectory"]) == (
        "trajectory",
        {"places": [0, 1, 3, 4], "steps": STEPS, "dtype": "float32"},
    )
    sections = {**SECTIONS["trajectory"], "output": {**SECTIONS["trajectory"]["output"], "uri": storage.root}}
    base = {"prompts": {"inline": ["a cat"]}, "generators": [{"model": "pack://tiny"}], **OPEN, **sections}
    base["sampler"] = {"num_inference_steps": STEPS}
    check_dataset(resolve_spec(parse_spec(base)))
    for key, change in {
        "recipe": {"recipe": "reflow", "trajectory": None, "output": {"uri": storage.root}},
        "trajectory": {"trajectory": {"keep": [0, -1], "dtype": "float32"}},
        "output.tensors": {"output": {"uri": storage.root, "tensors": {"text_embeddings": "float16"}}},
    }.items():
        with pytest.raises(UserError, match=f"^{key}: the dataset at .* was made with"):
            check_dataset(resolve_spec(parse_spec({**base, **change})))


def test_a_users_own_columns_are_not_taken_for_ids(generate_from, tmp_path):
    mine = {"text_id": "t-1", "negative_text_id": "t-2", "noise_sha256": "x", "trajectory": "left", "shot": "wide"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a red cat"} | mine))
    storage = Storage(str(generate_from(prompts={"path": str(tmp_path / "prompts.jsonl")}, **OPEN)))
    release(storage, "v1")
    (sample,) = read_samples(storage, "v1")
    assert (
        mine.items() <= json.loads(sample.row["extra_json"]).items() and sample.noise().shape == sample.latents().shape
    )
    assert mine.items() <= json.loads(rows(storage, "prompts")[0]["extra_json"]).items()
    for to in ("hf", "webdataset"):
        assert export(storage, "v1", to, str(tmp_path / to)).samples == 1


def test_a_plan_says_how_many_bytes_each_kind_takes(tmp_path):
    sections = {**SECTIONS["trajectory"], "output": {**SECTIONS["trajectory"]["output"], "uri": str(tmp_path / "new")}}
    base: dict[str, Any] = {
        "prompts": {"inline": ["a red cat", "a blue dog"]},
        "samples_per_prompt": 3,
        "buckets": [{"height": 32, "width": 32, "num_frames": 5}],
        "generators": [{"model": "pack://tiny"}],
        "sampler": {"num_inference_steps": STEPS},
        "layout": {"batch_size": 2},
    }
    plan = make_plan(parse_spec({**base, **OPEN, **sections}))
    generator = load_generator(GeneratorRef(resolve("pack://tiny", "generator")))
    values = int(np.prod(generator.latent_shape(32, 32, 5)))
    assert set(plan.nbytes) == {"trajectory", "text", "media"} and plan.nbytes["media"] > 0
    assert plan.nbytes["trajectory"] == 6 * 4 * values * 4
    assert 0 < plan.nbytes["text"] < 2 * 64 * 32 * 4  # two prompts, unpadded
    assert "bytes, if all are accepted" in render(plan, "x") and plan.as_dict()["bytes"] == plan.nbytes


@pytest.mark.parametrize("recipe", ["trajectory", "prompts"])
def test_report_and_card_of_a_dataset_with_tensors(recipe, dataset_of):
    storage = dataset_of(recipe)
    write_card(storage)
    build_report(storage)
    card = storage.read_bytes("README.md").decode()
    assert RECIPES[recipe] in card and "embeddings/*.parquet" in card
    assert ("media/*/*.tar" in card, "contact_sheet" in card) == (
        (True, True) if recipe == "trajectory" else (False, False)
    )
    assert ("tensors[0].shard` in `embeddings`" in card) == (recipe == "prompts")
    assert storage.size("report/index.html") > 1000


@pytest.mark.ray
def test_a_trajectory_run_that_ended_early_goes_on_and_verifies(tmp_path, run):
    root = tmp_path / "dataset"
    kept = SECTIONS["trajectory"]
    keys: dict[str, Any] = {
        **kept,
        **OPEN,
        "sampler": {"num_inference_steps": STEPS},
        "layout": {"batch_size": 2},
        "output": {**kept["output"], "uri": str(root), "commit_every": 0.1},
    }
    prompts = {"inline": ["a red cat", "a blue dog", "a green cat", "a red dog"]}
    for count in (2, 4):
        outcome = run(run.spec(root, prompts, target={"samples": count}, **keys))
        assert len(run.rows(root, "samples")) == count
        run.check(root, outcome)
    ids = [row["text_id"] for row in run.rows(root, "embeddings")]
    assert len(ids) == len(set(ids)) == 5  # four prompts and the empty negative one
    release(Storage(str(root)), "r1")
    assert all(sample.trajectory().places == (0, 1, 3, 4) for sample in read_samples(Storage(str(root)), "r1"))


@pytest.mark.parametrize("recipe", ["synthetic", "reflow"])
def test_columns_of_a_user_by_the_names_of_ours_are_no_texts(recipe, generate_from, tmp_path):
    named = {"text_id": 7, "negative_text_id": "x", "noise_sha256": "y", "trajectory": [1]}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a red cat {at}", **named}) + "\n" for at in range(3)))
    output = {**KEPT, "tensors": {"latents": "float32"}}
    storage = Storage(str(generate_from(**OPEN, recipe=recipe, prompts={"path": str(prompts)}, output=output)))
    assert [*verify(storage)] == []
    release(storage, "r1")
    sample = next(read_samples(storage, "r1"))
    said = json.loads(sample.row["extra_json"])
    assert {name: said.get(name) for name in named} == (
        named if recipe == "synthetic" else dict.fromkeys(named) | {"noise_sha256": said["noise_sha256"]}
    )
    assert sample.noise().shape == sample.latents().shape and sample.negative_text() == {}
    with pytest.raises(UserError, match="text_embeddings are not stored"):
        sample.text()
    assert regenerate(storage, sample.row["sample_id"]).is_same
