from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from infra.errors import UserError
from models import pack
from models.source import content_sha256, resolve


@pytest.fixture
def checkpoint(tiny_pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pack / "generator", tmp_path / "checkpoint"))


@pytest.mark.parametrize("part", ["generator", "judge", "expander"])
def test_resolve_pack_gives_each_part(part: str, tiny_pack: Path) -> None:
    assert resolve("pack://tiny", part) == str(tiny_pack / part)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("pack://nothing", "no such pack"),
        ("/no/such/folder", "does not exist"),
        ("./no-such-folder", "does not exist"),
        ("nobody/no-such-model", "neither a local folder nor a model"),
        ("memory://no/such/folder", "no safetensors"),
    ],
)
def test_resolve_missing_model_is_one_clear_line(uri: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(uri, "generator")
    text = str(error.value)
    assert words in text
    assert "\n" not in text
    assert text.startswith(("generators.model: ", "pack://"))


@pytest.mark.parametrize(
    ("part", "key"), [("generator", "generators.model"), ("judge", "judge.model"), ("expander", "prompts.expand.model")]
)
def test_resolve_says_which_part_a_pack_lacks_and_what_to_use(
    part: str, key: str, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack whose weights are shipped, one part at a time."""
    shipped = tmp_path / "shapes"
    shutil.copytree(tiny_pack, shipped)
    monkeypatch.setitem(pack.SHIPPED, "shapes", shipped)
    pack.pack_folder.cache_clear()
    try:
        assert resolve("pack://shapes", part) == str(shipped / part)
        shutil.rmtree(shipped / part)
        with pytest.raises(UserError, match=f"^{key}: pack://shapes has no {part} yet: use pack://tiny") as error:
            resolve("pack://shapes", part)
        assert "\n" not in str(error.value)
    finally:
        pack.pack_folder.cache_clear()


def test_resolve_names_the_key_of_its_part() -> None:
    with pytest.raises(UserError, match=r"^judge\.model: "):
        resolve("/no/such/folder", "judge")
    with pytest.raises(UserError, match=r"^judge\.decompose\.model: "):
        resolve("/no/such/folder", "decomposer")


def test_resolve_refuses_pickles(checkpoint: Path) -> None:
    for file in checkpoint.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"generators\.model: .*pickled weights"):
        resolve(str(checkpoint), "generator")


def test_resolve_refuses_what_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"model_index\.json"):
        resolve(str(checkpoint), "generator")
    pickle = tmp_path / "lora.pt"
    pickle.write_bytes(b"")
    with pytest.raises(UserError, match=r"generators\.adapters\.uri: .*not a \.safetensors file"):
        resolve(str(pickle), "adapter")


def test_resolve_fetches_a_url_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fsspec

    monkeypatch.setenv("DITMILL_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(checkpoint), "/bucket/wan", recursive=True)
    memory.pipe("/bucket/wan/evil.bin", b"never fetched")
    try:
        folder = resolve("memory://bucket/wan", "generator")
        assert content_sha256(folder) == content_sha256(str(checkpoint))
        assert not list(Path(folder).rglob("*.bin"))
    finally:
        memory.rm("/bucket", recursive=True)
    assert resolve("memory://bucket/wan", "generator") == folder


def test_resolve_takes_a_hub_id(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline, from a hub cache laid out as the hub's own client does."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    before = content_sha256(str(checkpoint))
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--nobody--wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / revision
    checkpoint.rename(snapshot)
    # What somebody else left in the cache is no part of the model.
    (snapshot / "wan-all-in-one.safetensors").write_bytes(b"other")
    (snapshot / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant")
    folder = resolve("nobody/wan", "generator")
    assert Path(folder) == snapshot
    assert content_sha256(folder) == before


def test_content_sha256_follows_weights_and_not_documents(checkpoint: Path) -> None:
    before = content_sha256(str(checkpoint))
    (checkpoint / "README.md").write_text("another text")
    assert content_sha256(str(checkpoint)) == before
    weights = next((checkpoint / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    status = weights.stat()
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = content_sha256(str(checkpoint))
    assert changed != before
    weights.rename(weights.with_name("other.safetensors"))
    assert content_sha256(str(checkpoint)) not in (before, changed)


def test_content_sha256_needs_no_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content_sha256(str(checkpoint))
    monkeypatch.setenv("DITMILL_CACHE", "/sys/ditmill")
    assert content_sha256(str(checkpoint)) == expected


def test_content_sha256_is_that_of_the_folder_not_of_its_place(checkpoint: Path, tiny_pack: Path) -> None:
    assert content_sha256(str(checkpoint)) == content_sha256(str(tiny_pack / "generator"))
