"""What is wrong with a spec, its models or its storage ends in one line that names key, finding and mend, and exit code 2."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from string import Template
from typing import NamedTuple

import pytest
import yaml

REPO = Path(__file__).parents[2]


class Mistake(NamedTuple):
    """A mistake by its name in docs/operations.md, keys of a spec that make it, and key, finding and mend as told."""

    name: str
    spec: str
    says: tuple[str, str, str]
    command: str = "run"
    cache: str = ""


MISTAKES = (
    Mistake(
        "an unknown key",
        "layout: {batchsize: 4}",
        ("layout.batchsize", "unknown key", "did you mean layout.batch_size?"),
    ),
    Mistake(
        "a value of the wrong type",
        "layout: {batch_size: many}",
        ("layout.batch_size", "found 'many'", "expected a whole number"),
    ),
    Mistake(
        "a prompt file that is missing",
        "prompts: {path: $nowhere}",
        ("prompts.path", "does not exist", "give the path of a text, JSONL, CSV or Parquet file"),
    ),
    Mistake(
        "a line that is no record",
        "prompts: {path: $broken}",
        ("prompts.path", "line 2: is not JSON", "write one object a line"),
    ),
    Mistake(
        "a record's value of the wrong type",
        "prompts: {path: $tall}",
        ("prompts.path", "line 2: height: expected a whole number from 8 to 2147483647, found 'tall'", "correct it"),
    ),
    Mistake(
        "a bucket outside of the spec's list",
        "{policy: {buckets: [mine]}, output: {uri: 's3://other/set'}}",
        ("output.uri", "s3://other/set is outside of policy.buckets (mine)", "use one of these, or add it there"),
    ),
    Mistake(
        "a URL with a password",
        "prompts: {path: 'https://me:hunter2@files.lab/a.txt'}",
        ("prompts.path", "https://files.lab/a.txt holds credentials", "take them out"),
    ),
    Mistake(
        "a missing model",
        "generators: [{model: $nowhere}]",
        ("generators.model", "does not exist", "give pack://tiny, a local folder"),
    ),
    Mistake(
        "a checkpoint of pickles only",
        "generators: [{model: $pickled}]",
        ("generators.model", "pickled weights only", "convert it to safetensors"),
    ),
    Mistake(
        "a checkpoint that is cut short",
        "generators: [{model: $short}]",
        ("generators.model", "damaged or cut short", "fetch it again"),
    ),
    Mistake(
        "a checkpoint that lacks weights",
        "generators: [{model: $partial}]",
        ("generators.model", "1 missing", "fetch it again"),
        command="plan",  # a run learns it from its worker, see tests/stages/test_actor.py
    ),
    Mistake(
        "a checkpoint that cannot be loaded",
        "generators: [{model: $garbled}]",
        ("generators.model", "cannot be loaded (OSError", "give a whole checkpoint"),
        command="plan",
    ),
    Mistake(
        "a licence that is refused",
        "{generators: [{model: 'pack://tiny', licence: own, may_train: no}], policy: {licences: refuse}}",
        ("policy.licences", "says no on training", "choose another model"),
    ),
    Mistake(
        "a dataset that keeps other tensors",
        "output: {uri: $v1}",
        ("output.tensors", "was made with {'latents': 'float16'}, found {}", "set output.uri to a new one"),
    ),
    Mistake(
        "a read-only output",
        "output: {uri: /sys/ditmill}",  # nobody may make a folder there, root neither
        ("output.uri", "/sys/ditmill cannot be written", "choose another place"),
    ),
    Mistake(
        "a read-only cache",
        "generators: [{model: 'file://$model'}]",
        ("DITMILL_CACHE", "/sys/ditmill cannot be written", "set it to a folder of your own"),
        cache="/sys/ditmill",
    ),
    Mistake(
        "a full disk",
        "output: {uri: $full}",
        ("output.uri", "cannot be written (No space left on device)", "free space"),
    ),
)


@pytest.fixture(scope="module")
def places(tiny_pack: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the specs of MISTAKES name."""
    from safetensors.numpy import load_file, save_file

    root = tmp_path_factory.mktemp("mistakes")
    for name in ("short", "partial", "garbled"):
        shutil.copytree(tiny_pack / "generator", root / name)
    (file,) = (root / "short" / "vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    (file,) = (root / "partial" / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    del weights[next(name for name in weights if "wi_0" in name)]
    save_file(weights, file, metadata={"format": "pt"})
    (root / "garbled" / "text_encoder" / "config.json").write_text('{"model_type": ')
    (root / "pickled").mkdir()
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (root / "broken.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": \n')
    (root / "tall.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": "a cat", "height": "tall"}\n')
    shutil.copytree(REPO / "tests" / "data" / "v1", root / "v1")
    names = ("short", "partial", "garbled", "pickled", "broken.jsonl", "tall.jsonl", "nowhere", "v1")
    made = {name.split(".")[0]: str(root / name) for name in names}
    return made | {"model": str(tiny_pack / "generator"), "full": str(disk / "full")}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: Mistake,
    places: dict[str, str],
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if mistake.name == "a full disk":
        _fill(disk, monkeypatch)
    spec = {"prompts": {"inline": ["a dog"]}, "output": {"uri": "out"}}
    spec |= yaml.safe_load(Template(mistake.spec).substitute(places))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    if mistake.cache:
        monkeypatch.setenv("DITMILL_CACHE", mistake.cache)
    monkeypatch.chdir(tmp_path)
    line = _refused([mistake.command, "spec.yaml"], monkeypatch, capfd)
    for words in mistake.says:
        assert words in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["report", "annotate --labels labels.csv", "annotate --withdraw", "release r1"])
def test_a_full_disk_is_one_line_for_every_command_that_writes(
    command: str,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from infra.storage import Storage
    from infra.tables import Table

    (disk / "ballast").unlink(missing_ok=True)
    shutil.copytree(REPO / "tests" / "data" / "v1", disk / "v1", dirs_exist_ok=True)
    sample_id = Table(Storage(str(disk / "v1")), "samples").read(["sample_id"])["sample_id"][0].as_py()
    (tmp_path / "labels.csv").write_text(f"sample_id,label\n{sample_id},y\n")
    _fill(disk, monkeypatch)
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    more = [sample_id] if options[-1:] == ["--withdraw"] else []
    line = _refused([name, str(disk / "v1"), *options, *more], monkeypatch, capfd)
    assert "cannot be written (No space left on device); free space" in line


def _fill(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from own_judge import fill

    for name in ("replace", "link"):  # to be put back: `fill` changes them where it has no disk to fill
        monkeypatch.setattr(os, name, getattr(os, name))
    fill(disk)


def _refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with, and with exit code 2."""
    from flows.cli import main

    monkeypatch.setattr(sys, "argv", ["ditmill", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if not line.startswith(("new dataset", "licence:")))
    assert line.startswith("ditmill: ")
    return line


def test_what_ends_with_2_is_documented() -> None:
    from harness import documented

    said = {row[0]: row[1] for row in documented("When a command ends with 2")}
    assert said == {mistake.name: mistake.says[0] for mistake in MISTAKES}
