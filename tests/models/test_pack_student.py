"""pack://shapes-4step: shipped as what differs from pack://shapes, found as an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.errors import UserError
from models import pack
from models.families import table
from models.pack.train.assemble import differing
from models.source import content_sha256, resolve

NAME = "pack://shapes-4step"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A checkpoint beside that of pack://shapes, with one other weight and another scheduler."""
    folder = Path(shutil.copytree(resolve("pack://shapes", "generator"), tmp_path / "student"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"solver_order": 1}))
    (folder / "ditmill.json").write_text('{"teacher": "pack://shapes"}')
    (folder / "state" / "step-00000240").mkdir(parents=True)
    (folder / "state" / "step-00000240" / "average-0.pt").write_bytes(b"of its training")
    return folder


@pytest.fixture
def shipped(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same as the repository would hold it."""
    folder = tmp_path / "shapes-4step" / "generator"
    differing(student, folder)
    monkeypatch.setattr(pack, "_differing", lambda _: folder)
    monkeypatch.setenv("DITMILL_CACHE", str(tmp_path / "cache"))
    pack.pack_folder.cache_clear()
    yield folder
    pack.pack_folder.cache_clear()


def test_what_it_shares_is_not_shipped_twice(shipped: Path) -> None:
    assert {path.name for path in shipped.iterdir()} == {
        "transformer",
        "scheduler",
        "model_index.json",
        "README.md",
        "ditmill.json",
    }
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 13e6


def test_its_generator_is_the_students_checkpoint(shipped: Path, student: Path) -> None:
    folder = Path(resolve(NAME, "generator"))
    assert content_sha256(str(folder)) == content_sha256(str(student))
    assert (folder / "ditmill.json").read_text() == (student / "ditmill.json").read_text()
    assert not any(file.is_symlink() for file in folder.rglob("*"))


def test_another_student_is_not_taken_for_it(shipped: Path) -> None:
    before = resolve(NAME, "generator")
    (shipped / "scheduler" / "scheduler_config.json").write_text("{}")
    pack.pack_folder.cache_clear()
    after = resolve(NAME, "generator")
    assert after != before and (Path(after) / "scheduler" / "scheduler_config.json").read_text() == "{}"


@pytest.mark.parametrize("part", ["judge", "expander"])
def test_its_other_parts_are_those_of_shapes(part: str, shipped: Path) -> None:
    assert resolve(NAME, part) == resolve("pack://shapes", part)


def test_models_names_it_once_it_is_there(shipped: Path) -> None:
    rows = {row["pipeline"]: row["packs"] for row in table()}
    assert rows["WanPipeline"] == ["pack://shapes", NAME, "pack://tiny"] and not rows["FluxPipeline"]
    shutil.rmtree(shipped)
    assert NAME not in table()[0]["packs"]
    pack.pack_folder.cache_clear()
    with pytest.raises(UserError, match=r"there is no such pack; there are: shapes, tiny$"):
        resolve(NAME, "generator")


@pytest.mark.parametrize(
    ("file", "words"), [("vae/config.json", "vae is not"), ("transformer/config.json", "its transformer's conf")]
)
def test_what_is_no_student_of_shapes_is_refused(file: str, words: str, student: Path, tmp_path: Path) -> None:
    config = json.loads((student / file).read_text())
    (student / file).write_text(json.dumps(config | {"dropout": 0.5}))
    with pytest.raises(UserError, match=words):
        differing(student, tmp_path / "refused")
