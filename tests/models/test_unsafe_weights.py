"""No pickle and no code of a checkpoint runs, whatever part it is of and wherever it lies."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from models.generator import Generator
from models.language import Language, LanguageRef
from models.loading import GeneratorRef
from models.multimodal import Multimodal, MultimodalRef
from models.source import PICKLES, resolve

NAMES = (
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "model.pt",
    "model.ckpt",
    "model.pkl",
    "pytorch_lora_weights.bin",
)
CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


class Trap:
    """Pickled, it touches a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.marker), os.O_CREAT | os.O_WRONLY)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def plant(folder: Path, marker: Path) -> None:
    for name in NAMES:
        (folder / name).write_bytes(pickle.dumps({"weight": Trap(marker)}))


def test_the_trap_works(marker: Path) -> None:
    """Else none of these tests could fail."""
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()


def load_generator(folder: Path) -> object:
    return [Generator(GeneratorRef(str(folder))).load(part) for part in ("encode", "sample", "decode")]


def load_adapter(folder: Path, pack: Path) -> object:
    return Generator(GeneratorRef(str(pack / "generator"), adapters=((str(folder), 1.0),))).load("sample")


Load = Callable[[Path, Path], object]
ROLES: dict[str, tuple[str, str, str, Load]] = {
    "text encoder": ("generator", "text_encoder", "generators.model", lambda folder, _: load_generator(folder)),
    "denoiser": ("generator", "transformer", "generators.model", lambda folder, _: load_generator(folder)),
    "decoder": ("generator", "vae", "generators.model", lambda folder, _: load_generator(folder)),
    "judge and captioner": ("judge", "", "judge.model", lambda folder, _: Multimodal(MultimodalRef(str(folder)))),
    "expander": ("expander", "", "prompts.expand.model", lambda folder, _: Language(LanguageRef(str(folder)))),
    "adapter": ("adapter", "", "generators.adapters", load_adapter),
}
"""Part of a checkpoint, the folder of it that holds pickles, the spec's key, and what loads it."""


def checkpoint(part: str, pack: Path, root: Path) -> Path:
    folder = root / "checkpoint"
    if part == "adapter":
        folder.mkdir()
        return folder
    return Path(shutil.copytree(pack / part, folder))


@pytest.mark.parametrize("role", ROLES)
def test_a_checkpoint_of_pickles_only_is_refused_in_a_line_that_names_one(
    role: str, tiny_pack: Path, tmp_path: Path, marker: Path
) -> None:
    part, inner, key, _ = ROLES[role]
    folder = checkpoint(part, tiny_pack, tmp_path)
    for file in (folder / inner).glob("*.safetensors"):
        file.unlink()
    plant(folder / inner, marker)
    with pytest.raises(UserError) as caught:
        resolve(str(folder), part)
    line = str(caught.value)
    assert line.startswith(f"{key}") and "\n" not in line
    named = f"{inner}/{sorted(NAMES)[0]}".lstrip("/")
    assert f"holds pickled weights only ({named})" in line and "convert it to safetensors" in line
    assert not marker.exists()


@pytest.mark.parametrize("beside", ["elsewhere", "nowhere"])
@pytest.mark.parametrize("role", ROLES)
def test_a_pickle_never_runs_even_where_nobody_looked_before_loading(
    role: str, beside: str, tiny_pack: Path, tmp_path: Path, marker: Path
) -> None:
    part, inner, key, load = ROLES[role]
    folder = checkpoint(part, tiny_pack, tmp_path)
    for file in (folder / inner).glob("*.safetensors"):
        if beside == "elsewhere":  # somewhere below there are safetensors, which is all that a hasty look would see
            (folder / inner / "onnx").mkdir(exist_ok=True)
            shutil.copy(file, folder / inner / "onnx")
        file.unlink()
    plant(folder / inner, marker)
    with pytest.raises(UserError) as caught:
        load(folder, tiny_pack)
    assert "\n" not in str(caught.value) and key.split(".")[0] in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("role", [role for role in ROLES if role != "adapter"])
def test_a_pickle_beside_safetensors_is_left_alone(role: str, tiny_pack: Path, tmp_path: Path, marker: Path) -> None:
    part, inner, _, load = ROLES[role]
    folder = checkpoint(part, tiny_pack, tmp_path)
    plant(folder / inner, marker)
    assert resolve(str(folder), part) == str(folder)
    load(folder, tiny_pack)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", PICKLES)
def test_an_adapter_that_is_a_pickle_is_refused(suffix: str, tmp_path: Path, marker: Path) -> None:
    file = tmp_path / f"lora{suffix}"
    file.write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(UserError, match=rf"^generators\.adapters\.uri: .*lora\{suffix} is not a \.safetensors file"):
        resolve(str(file), "adapter")
    assert not marker.exists()


@pytest.mark.parametrize("part", ["judge", "expander"])
def test_code_that_a_config_names_never_runs(part: str, tiny_pack: Path, tmp_path: Path, marker: Path) -> None:
    folder = checkpoint(part, tiny_pack, tmp_path)
    (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    for file, names in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText")),
        ("tokenizer_config.json", ("AutoTokenizer", "AutoProcessor")),
        ("processor_config.json", ("AutoProcessor",)),
    ):
        path = folder / file
        config = json.loads(path.read_text()) if path.exists() else {}
        config["auto_map"] = dict.fromkeys(names, "mine.Mine")
        config |= {"model_type": "mine"} if file == "config.json" else {}
        path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        Multimodal(MultimodalRef(str(folder))) if part == "judge" else Language(LanguageRef(str(folder)))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("remote_code", [None, "org/pipeline"])
@pytest.mark.parametrize("where", ["component", "pipeline", "namesake"])
def test_code_in_a_pipeline_never_runs(
    where: str, remote_code: str | None, tiny_pack: Path, tmp_path: Path, marker: Path
) -> None:
    folder = checkpoint("generator", tiny_pack, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    place = {"component": "transformer/mine.py", "pipeline": "mine.py", "namesake": f"{remote_code}.py"}[where]
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text(CODE.format(marker=str(marker)))
    if where == "namesake" and remote_code is None:
        index["_class_name"] = ["None", "Mine"]
    elif where == "component":
        index["transformer"] = ["mine", "Mine"]
    elif where == "pipeline":
        index["_class_name"] = ["mine", "Mine"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"^generators\.model: ") as caught:
        Generator(GeneratorRef(str(folder), remote_code=remote_code, revision="0" * 40)).load("sample")
    assert "\n" not in str(caught.value)
    assert not marker.exists()
