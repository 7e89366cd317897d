"""Where a model comes from: the name in a spec becomes a local folder, and the folder an identity.

Only safetensors are read. A checkpoint that has nothing but pickles is refused, because loading one runs its code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from infra.errors import UserError
from models.pack import PARTS, cache_dir, pack_part

LOADED = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Suffixes of the files that loaders read: these are hashed, and these are fetched."""
RECORD = "ditmill.json"
"""In a student's folder: what it was made from."""
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", RECORD)
"""Fetched too, but no part of a model's content."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)[.-]|^consolidated")
"""Second copies of the same weights, which are never loaded."""

_KEYS = {
    "generator": "generators.model",
    "judge": "judge.model",
    "expander": "prompts.expand.model",
    "decomposer": "judge.decompose.model",
    "adapter": "generators.adapters.uri",
}
_INDEX = {
    "generator": "model_index.json",
    "judge": "config.json",
    "expander": "config.json",
    "decomposer": "config.json",
}


def resolve(uri: str, part: str, revision: str | None = None, key: str | None = None) -> str:
    """Local path of a model: a folder, or for `part='adapter'` also one safetensors file.

    `uri` is pack://NAME, a local path, an fsspec URL (fetched once into the cache) or a hub id; `part` is generator,
    judge, expander, decomposer or adapter. A UserError names the key of the spec that is wrong: `key`, or else the part's.
    """
    key = key or _KEYS[part]
    if uri.startswith("pack://"):
        if part not in PARTS:
            raise UserError(f"{key}: {uri} has no {part}; a pack has: {', '.join(PARTS)}")
        try:
            path = pack_part(uri.removeprefix("pack://").strip("/"), part)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    elif "://" in uri:
        path = _fetch(uri, key)
    else:
        local = Path(uri).expanduser()
        path = local.absolute() if local.exists() or _looks_local(uri) else _from_hub(uri, key, revision)
    _check(path, part, uri, key)
    return str(path)


def is_here(uri: str, revision: str | None = None) -> bool:
    """Whether `resolve` would find the model without fetching it. A local path that is wrong counts as here."""
    if uri.startswith("pack://"):
        return True
    if "://" in uri:
        return _fetched(uri).exists()
    if Path(uri).expanduser().exists() or _looks_local(uri):
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(uri, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError):
        return False
    return True


def content_sha256(path: str) -> str:
    """sha256 of a model's content: of the sorted (relative path, sha256) of each file that loaders read.

    Hashes of large files are kept in the cache by (path, size, mtime). Documentation is not content.
    """
    total = hashlib.sha256()
    for name, file in files_of(path).items():
        total.update(f"{name}\0{_file_sha256(file)}\n".encode())
    return total.hexdigest()


def files_of(path: str) -> dict[str, Path]:
    """The files of a model that loaders read, by their names relative to its folder, sorted; a file alone by its own name."""
    root = Path(path)
    if root.is_file():
        return {root.name: root}
    names = {file.relative_to(root).as_posix(): file for file in _loaded_files(root)}
    return dict(sorted(names.items()))


def _looks_local(uri: str) -> bool:
    return uri.startswith((".", "/", "~")) or uri.count("/") != 1


def _loaded_files(root: Path) -> Iterable[Path]:
    """Files that loaders read. A pipeline's are those of its components: a hub cache may hold others beside them."""
    components = _components(root)
    for file in root.rglob("*"):
        parts = file.relative_to(root).parts
        known = components is None or parts[0] in components or parts == ("model_index.json",)
        hidden = any(name.startswith(".") for name in parts)
        if known and not hidden and file.suffix in LOADED and not _VARIANT.search(file.name) and file.is_file():
            yield file


def _components(root: Path) -> set[str] | None:
    """Folders of a pipeline's components, or None where `root` is no pipeline."""
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return {name for name, value in index.items() if isinstance(value, list)} if isinstance(index, dict) else None


def _check(path: Path, part: str, uri: str, key: str) -> None:
    if not path.exists():
        raise UserError(f"{key}: {uri} does not exist; give pack://tiny, a local folder, an fsspec URL or a hub id")
    if path.is_file():
        if part != "adapter":
            raise UserError(f"{key}: {uri} is a file; expected a checkpoint folder with {_INDEX[part]}")
        if path.suffix != ".safetensors":
            raise UserError(f"{key}: {uri} is not a .safetensors file; no other format of weights is read")
        if not _is_whole(path):
            raise UserError(f"{key}: {uri} is damaged or cut short; fetch it again")
        return
    for file in _loaded_files(path):
        if file.suffix == ".safetensors" and not _is_whole(file):
            raise UserError(f"{key}: {uri}: {file.relative_to(path)} is damaged or cut short; fetch it again")
    if pickle := _only_pickled(path, part):
        raise UserError(
            f"{key}: {uri} holds pickled weights only ({pickle}), which run code when loaded; convert it to safetensors"
        )
    if not any(path.rglob("*.safetensors")):
        raise UserError(f"{key}: {uri} holds no .safetensors weights; it is no checkpoint folder")
    index = _INDEX.get(part)
    if index and not (path / index).is_file():
        raise UserError(f"{key}: {uri} has no {index}; give the folder that holds it")


def _only_pickled(root: Path, part: str) -> str:
    """A file of pickled weights in a folder that loaders look into and that has no others; empty where there is none."""
    components = _components(root) if part == "generator" else None
    folders = [root] if components is None else [root / name for name in sorted(components)]
    for folder in folders:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if not any(file.suffix == ".safetensors" for file in files):
            for file in files:
                if file.suffix in PICKLES:
                    return file.relative_to(root).as_posix()
    if not any(root.rglob("*.safetensors")):
        found = (file for file in sorted(root.rglob("*")) if file.suffix in PICKLES)
        return next((file.relative_to(root).as_posix() for file in found), "")
    return ""


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file has the header of one and all the bytes that it speaks of."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            return False
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            return False
    return bool(size == 8 + length + max(ends, default=0))


def _from_hub(uri: str, key: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        skipped = ["*.fp16*", "*.bf16*", "*.non_ema*", "*.ema*", "consolidated*", "original/*"]
        return Path(snapshot_download(uri, revision=revision, allow_patterns=list(patterns), ignore_patterns=skipped))

    try:
        components = _components(fetch("model_index.json", *DOCUMENTS))
        places = [""] if components is None else [f"{name}/" for name in sorted(components)]
        return fetch("model_index.json", *DOCUMENTS, *(f"{place}*{suffix}" for place in places for suffix in LOADED))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {uri} is neither a local folder nor a model that can be fetched from the hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _fetched(uri: str) -> Path:
    """Where the copy of an fsspec URL lies once it is fetched."""
    return cache_dir() / "models" / hashlib.sha256(uri.encode()).hexdigest()[:32]


def _fetch(uri: str, key: str) -> Path:
    """A copy of an fsspec folder in the cache, whole or absent."""
    import fsspec

    target = _fetched(uri)
    if target.exists():
        return _only_file(target, uri)
    try:
        fs, remote = fsspec.core.url_to_fs(uri)
        names = [remote] if fs.isfile(remote) else fs.find(remote)
    except Exception as error:
        raise UserError(
            f"{key}: {uri} cannot be listed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    wanted = [name for name in names if name.endswith(LOADED) or PurePosixPath(name).name in DOCUMENTS]
    if not any(name.endswith(".safetensors") for name in wanted):
        found = "only pickled weights" if any(name.endswith(PICKLES) for name in names) else "no safetensors"
        raise UserError(f"{key}: {uri} holds {found}; give a checkpoint folder with safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)
    fetching = Path(tempfile.mkdtemp(prefix=".fetch-", dir=target.parent))
    try:
        for name in wanted:
            relative = PurePosixPath(name).name if name == remote else name.removeprefix(remote).lstrip("/")
            local = fetching / relative
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(local))
        try:
            fetching.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(fetching, ignore_errors=True)
    return _only_file(target, uri)


def _only_file(folder: Path, uri: str) -> Path:
    single = folder / PurePosixPath(uri).name
    return single if uri.endswith(".safetensors") and single.is_file() else folder


def _file_sha256(file: Path) -> str:
    status = file.stat()
    if status.st_size < 1 << 20:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    entry = cache_dir() / "sha256" / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
    known = [status.st_size, status.st_mtime_ns]
    try:
        size, mtime, digest = json.loads(entry.read_text())
        if [size, mtime] == known:
            return str(digest)
    except (OSError, ValueError):
        pass
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that is full or read-only costs time, and no more
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump([*known, digest], out)
            Path(temporary).replace(entry)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    return digest
