"""Models on a cluster: a node that lacks one takes its files from the driver's machine, once for all of its processes.

    driver: content hash and list of files of each model     a Library, on the driver's machine, reads them
    worker: is it at the same path here?   else: is it in this machine's cache?   else: fetch it there, behind a lock

What a model is, is its content: a folder at the same path with other bytes is not it, whatever its name. What is in the cache
was compared when it was fetched, and is whole or absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.telemetry import log
from models.language import LanguageRef
from models.loading import GeneratorRef
from models.multimodal import MultimodalRef
from models.pack import cache_dir
from models.source import content_sha256, files_of
from models.vllm import VllmRef
from stages.batch import Batch, HoldsStage, Stage, WorldFault

CHUNK = 32 << 20
"""Bytes of one answer, which goes through Ray's object store."""
UNDER_WAY = 2
"""Answers that a node waits for at a time."""

Ref = GeneratorRef | MultimodalRef | VllmRef | LanguageRef


@dataclass(frozen=True)
class Model:
    """A model as the driver has it: `path` there, `files` with their sizes in bytes, by names relative to a folder."""

    path: str
    sha256: str
    files: tuple[tuple[str, int], ...]
    is_file: bool = False

    @classmethod
    def at(cls, path: str) -> Model:
        return cls(path, content_sha256(path), _listing(path), Path(path).is_file())


Pieces = Callable[[Model], Iterator[tuple[str, np.ndarray]]]
"""The bytes of a model: (name, uint8 [n]), one file after the other, in the order of `files`; of an empty one [0]."""


class Library:
    """Reads files of the models that it was made with, and of nothing else."""

    def __init__(self, models: tuple[Model, ...]) -> None:
        self._files = {
            (model.path, name): Path(model.path) if model.is_file else Path(model.path, name)
            for model in models
            for name, _ in model.files
        }

    def read(self, path: str, name: str, offset: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], fewer where the file ends. PermissionError where the library does not hold it."""
        file = self._files.get((path, name))
        if file is None:
            raise PermissionError(f"{name} of {path} is no file of a model of this run")
        return np.fromfile(file, np.uint8, nbytes, offset=offset)


@dataclass(frozen=True)
class Delivery:
    """What the driver knows of its models, and the actor that hands them out."""

    models: dict[str, Model]
    library: Any

    def of(self, stage: Stage) -> Stage:
        """The stage, or one that it holds, with models that are fetched where they are needed."""
        held = {name: self.of(value) for name, value in _values(stage) if callable(getattr(value, "load", None))}
        if held:
            return replace(stage, **held)  # type: ignore[type-var]
        paths = paths_of(stage)
        return Delivered(stage, tuple(self.models[path] for path in paths), self.library) if paths else stage


@dataclass(frozen=True)
class Delivered(HoldsStage):
    """`stage` with the paths of the machine that runs it."""

    models: tuple[Model, ...]
    library: Any = field(repr=False)

    def fetch(self) -> None:
        """Fetch what this machine lacks. WorldFault where that fails."""
        self._here()

    def load(self) -> None:
        self._here().load()

    def __call__(self, batch: Batch) -> Batch:
        return self._here()(batch)

    def _here(self) -> Stage:
        for model in self.models:
            if model not in _found:
                _found[model] = path_here(model, _pieces_of(self.library))
        return moved(self.stage, {model.path: _found[model] for model in self.models})  # type: ignore[no-any-return]


_found: dict[Model, str] = {}
"""Where this process has found models."""


def deliver(stages: Iterable[Stage]) -> Delivery | None:
    """On the driver: a library of the models of `stages`, on this machine; None where they have none."""
    models = {path: Model.at(path) for path in paths_of(tuple(stages))}
    if not models:
        return None
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    library = ray.remote(Library).options(num_cpus=0, scheduling_strategy=here).remote(tuple(models.values()))
    return Delivery(models, library)


def paths_of(value: Any) -> list[str]:
    """Paths of the models that frozen dataclasses and tuples of them refer to, each once."""
    found: list[str] = []

    def note(ref: Ref) -> Ref:
        found.extend([ref.path, *(path for path, _ in getattr(ref, "adapters", ()))])
        if isinstance(ref, GeneratorRef) and ref.teacher is not None:
            found.append(ref.teacher.path)
        return ref

    _change(value, note)
    return list(dict.fromkeys(found))


def moved(value: Any, places: dict[str, str]) -> Any:
    """The same with the models at other paths. What else has the text of a path, such as a name in a row, stays."""

    def move(ref: Ref) -> Ref:
        paths: dict[str, Any] = {"path": places[ref.path]}
        if isinstance(ref, GeneratorRef):
            paths["adapters"] = tuple((places[path], weight) for path, weight in ref.adapters)
            paths["teacher"] = ref.teacher and replace(ref.teacher, path=places[ref.teacher.path])
        return replace(ref, **paths)

    return _change(value, move)


def path_here(model: Model, pieces: Pieces) -> str:
    """Where this machine has the model; fetched into its cache if need be. WorldFault where that fails.

    Of several processes that ask at once one fetches, and the others wait for it.
    """
    if _is_same(model):
        return model.path
    folder = cache_dir() / "models" / model.sha256
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{model.sha256}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _listing(_within(folder, model)) != model.files:
                _fetch(model, pieces, folder)
    except (OSError, RayError) as error:
        cause = getattr(error, "cause", None) or error
        why = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0][:300]}"
        raise WorldFault(f"{_failed(model, folder)} ({why})") from error
    return _within(folder, model)


def _fetch(model: Model, pieces: Pieces, folder: Path) -> None:
    began, nbytes = time.perf_counter(), sum(size for _, size in model.files)
    fetching = folder.with_name(f".{folder.name}")
    shutil.rmtree(fetching, ignore_errors=True)  # of a process that was killed
    if (free := shutil.disk_usage(folder.parent).free) < nbytes:
        raise OSError(f"{nbytes:,} bytes are needed and {free:,} free; make room, or set DITMILL_CACHE")
    try:
        for name, _ in model.files:
            inside(fetching, name).parent.mkdir(parents=True, exist_ok=True)
        for name, piece in pieces(model):
            with inside(fetching, name).open("ab") as file:
                file.write(piece.data)
        fetched = _within(fetching, model)
        if _listing(fetched) != model.files or content_sha256(fetched) != model.sha256:
            raise WorldFault(f"{_failed(model, folder)}: it has changed since the run began")
        shutil.rmtree(folder, ignore_errors=True)  # one that lacks files
        fetching.rename(folder)
    finally:
        shutil.rmtree(fetching, ignore_errors=True)
    seconds = round(time.perf_counter() - began, 2)
    log().info("model fetched", path=model.path, to=str(folder), nbytes=nbytes, seconds=seconds)


def _within(folder: Path, model: Model) -> str:
    """Path of a model whose files are in `folder`."""
    return str(folder / model.files[0][0] if model.is_file else folder)


def inside(folder: Path, name: str) -> Path:
    """`name` within `folder`. WorldFault where it would lie outside of it."""
    relative = PurePosixPath(name)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise WorldFault(f"a model's file is called {name!r}, which is no name within its folder")
    return folder / relative


def _failed(model: Model, folder: Path) -> str:
    return f"the model {model.path} could not be fetched from the driver's machine to {socket.gethostname()}:{folder}"


def _is_same(model: Model) -> bool:
    """Whether what lies at the model's path on this machine is the model. Sizes are looked at first, as they cost nothing."""
    with contextlib.suppress(OSError):  # a folder of another user
        return _listing(model.path) == model.files and content_sha256(model.path) == model.sha256
    return False


def _listing(path: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, file.stat().st_size) for name, file in files_of(path).items())


def _pieces_of(library: Any) -> Pieces:
    """The pieces as an actor, a `Library`, reads them."""

    def pieces(model: Model) -> Iterator[tuple[str, np.ndarray]]:
        waiting: deque[tuple[str, Any]] = deque()
        for name, size in model.files:
            for offset in range(0, max(size, 1), CHUNK):
                nbytes = min(CHUNK, size - offset)
                waiting.append((name, library.read.remote(model.path, name, offset, nbytes)))
                if len(waiting) == UNDER_WAY:
                    name_of, ref = waiting.popleft()
                    yield name_of, ray.get(ref)
        for name_of, ref in waiting:
            yield name_of, ray.get(ref)

    return pieces


def _change(value: Any, change: Callable[[Ref], Ref]) -> Any:
    """`value` with `change` of each reference to a model in it; the same object where nothing changes."""
    if isinstance(value, Ref):
        return change(value)
    if type(value) is tuple:
        items = tuple(_change(item, change) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    changed = {name: new for name, old in _values(value) if (new := _change(old, change)) is not old}
    return replace(value, **changed) if changed else value


def _values(value: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass, by name; of anything else none."""
    if not is_dataclass(value):
        return []
    return [(each.name, getattr(value, each.name)) for each in fields(value) if each.init]
