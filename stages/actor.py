"""Runs stages over a batch in one process: times them, shares their cost, and keeps one bad sample from harming the rest.

An actor holds one or several stages; those that use the same model share one. Between actors a batch travels as a block of
one row (its pickled columns, tensors out of band), because Ray Data re-cuts blocks of many rows.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from infra.errors import UserError
from infra.quarantine import here
from infra.storage import refused
from infra.telemetry import bound, configure, log
from stages.batch import STOPPED, Batch, SampleError, Stage, WorldFault, size, take, texts
from stages.canary import made_of, taken_through

PAYLOAD = pa.schema([("columns", pa.large_binary()), ("tensors", pa.list_(pa.large_binary()))])


def pack(batch: Batch) -> pa.Table:
    """A batch as a block of one row."""
    buffers: list[pickle.PickleBuffer] = []
    columns = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    # By hand: pyarrow 26 never lets go of a memoryview that `pa.array` was given.
    ends = np.cumsum([0, *(len(tensor) for tensor in raw)], dtype=np.int64)
    parts = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(raw))]
    values = pa.Array.from_buffers(pa.large_binary(), len(raw), parts)
    tensors = pa.ListArray.from_arrays(pa.array([0, len(raw)], pa.int32()), values)
    return pa.table([pa.array([columns], pa.large_binary()), tensors], schema=PAYLOAD)


def unpack(block: pa.Table) -> Batch:
    """The batch of a block made by `pack`. Its tensors are read-only views of the block."""
    tensors = block["tensors"].combine_chunks()[0].values
    buffers = [tensors[i].as_buffer() for i in range(len(tensors))] if tensors is not None else []
    return pickle.loads(block["columns"][0].as_buffer(), buffers=buffers)


class LedgerEntry(NamedTuple):
    """Where the seconds of one actor went so far; the newest entry of an actor says it all.

    An actor that dies is started again in the same slot. Times are Unix seconds, durations seconds, `accelerators` the
    actor's share of devices. `shared_seconds` is what the rows' costs hold of `busy_seconds`.
    """

    actor: str
    slot: str
    slot_started_at: float
    group: str
    accelerators: float
    started_at: float
    ended_at: float
    boot_seconds: float
    load_seconds: float
    idle_seconds: float
    busy_seconds: float
    shared_seconds: float
    cpu_seconds: float
    reproducible: str
    devices: str
    """Where it samples, with its group's ranks, as infra.quarantine names them, joined by commas; empty where it does not."""


class Step(NamedTuple):
    """What one stage took for one batch, for those who watch: Unix seconds, and seconds as the rows' costs have them."""

    stage: str
    began: float
    ended: float
    accelerator_seconds: float
    cpu_seconds: float


class StageActor:
    """A Ray Data callable class that takes a batch through `stages`.

    Args:
        group: name of the actor group, for logs and the ledger.
        stages: the stages, in order.
        drop: columns, or prefixes ending in a dot, that nobody needs afterwards.
        accelerators: devices this actor holds; 1 on a CPU-only machine, where an actor counts as one accelerator.
        earliest: when the run asked for its actors, Unix seconds: a worker process may be older than that.
        context: bound to every log line (run_id).
        register: the run's mailbox: it is told of this actor, so that the run can end it, and of the canary.
        canary: a packed batch of one sample; left out, none is made.
    """

    def __init__(
        self,
        group: str,
        stages: tuple[Stage, ...],
        drop: tuple[str, ...] = (),
        accelerators: float = 1.0,
        earliest: float = 0.0,
        context: dict[str, str] | None = None,
        register: Any = None,
        canary: pa.Table | None = None,
    ) -> None:
        configure(**(context or {}), group=group)
        self.group, self.stages, self.drop, self.accelerators = group, stages, drop, accelerators
        self._id = f"{os.uname().nodename}-{os.getpid()}"
        called = time.time()
        self._started = min(called, max(earliest, _process_start()))
        self._slot, restarted = _slot(self._id)
        if register is not None:
            register.join.remote(self._slot, sys.modules["ray"].get_runtime_context().current_actor)
        self._slot_started = min(earliest or self._started, self._started) if restarted else self._started
        self._boot = called - self._started
        self._idle = self._busy = self._shared = 0.0
        self._reproducible = self._fault = self._devices = ""
        loading = time.perf_counter()
        try:
            for stage in stages:
                stage.load()
            self._reproducible = _self_test(stages)
            self._devices = _devices(stages)
            if canary is not None and (differs := _canary(stages, unpack(canary), register)):
                self._fault = f"device: {self._devices}: the canary {differs}"
        except Exception as error:
            self._fault = _fault(error)
        self._last = time.perf_counter()
        self._load = self._last - loading
        log().info("loaded", seconds=round(self._load, 2), stages=[stage.name for stage in stages])

    def __call__(self, block: pa.Table) -> pa.Table:
        return pack(self.run(unpack(block)))

    def run(self, batch: Batch) -> Batch:
        """The batch after all stages. Where the world is at fault, not a sample, it is a batch of one column, `fault`."""
        if not batch or "fault" in batch:
            return batch  # an empty one stands for a batch that is long done (see the mailbox)
        began = time.perf_counter()
        self._idle += began - self._last
        number = int(batch["batch_index"][0])
        at = ""
        try:
            if self._fault:
                return _faulty(number, self._fault)
            steps = []
            for stage in self.stages:
                at, wall, cpu = stage.name, time.time(), time.process_time()
                with bound(stage=at):
                    batch, seconds = run_stage(stage, batch, self.accelerators)
                self._shared += seconds / self.accelerators if self.accelerators else 0.0
                steps.append(Step(at, wall, time.time(), seconds, time.process_time() - cpu))
        except Exception as error:
            log().error("batch failed", exc_info=True, stage=at, batch_index=number)
            return _faulty(number, _fault(error))
        finally:
            self._last = time.perf_counter()
            self._busy += self._last - began
        kept = {name: column for name, column in batch.items() if "result" in batch or not self._dropped(name)}
        return _with_entry(kept, self._entry(), steps)

    def _entry(self) -> LedgerEntry:
        return LedgerEntry(
            actor=self._id,
            slot=self._slot,
            slot_started_at=self._slot_started,
            group=self.group,
            accelerators=self.accelerators,
            started_at=self._started,
            ended_at=time.time(),
            boot_seconds=self._boot,
            load_seconds=self._load,
            idle_seconds=self._idle,
            busy_seconds=self._busy,
            shared_seconds=self._shared,
            cpu_seconds=time.process_time(),
            reproducible=self._reproducible,
            devices=self._devices,
        )

    def _dropped(self, name: str) -> bool:
        return any(name.startswith(prefix) if prefix.endswith(".") else name == prefix for prefix in self.drop)


def run_stage(stage: Stage, batch: Batch, accelerators: float = 1.0) -> tuple[Batch, float]:
    """`batch` after `stage`, and the seconds shared over its samples.

    A stage that takes failed samples too (a writer) gets the whole batch and its cost is not shared.
    """
    if getattr(stage, "takes_failed", False):
        return stage(batch), 0.0
    live = batch["error_type"] == ""
    if stage.skips_rejected and "verdict" in batch:
        live &= batch["verdict"] != "rejected"
    if live.any() and (wants := getattr(stage, "wants", None)) is not None:
        live &= wants(batch)
    index = np.flatnonzero(live)
    if len(index) == 0:
        return batch, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for rows, out in _isolated(stage, batch, index):
        batch = _scatter(batch, rows, out)
    seconds = time.perf_counter() - wall
    failed = (batch["error_type"] != "") & (batch["error_stage"] == "")
    if failed.any():
        stages = batch["error_stage"].copy()
        stages[failed] = stage.name
        batch = {**batch, "error_stage": stages}
        for at in np.flatnonzero(failed):
            error = {"error_type": batch["error_type"][at], "error": str(batch["error"][at])[:500]}
            said = ("info", "sample stopped") if error["error_type"] == STOPPED else ("warning", "sample failed")
            getattr(log(), said[0])(said[1], stage=stage.name, sample_id=batch["sample_id"][at], **error)
    cost = {
        "stage": stage.name,
        "accelerator_seconds": seconds * accelerators / len(index),
        "cpu_seconds": (time.process_time() - cpu) / len(index),
    }
    return {**batch, "cost": _with_cost(batch, index, cost)}, seconds * accelerators


def _with_cost(batch: Batch, index: np.ndarray, cost: dict[str, Any]) -> np.ndarray:
    """The column `cost` with one more entry for the samples at `index`. Most of them have the same text so far."""
    costs = batch.get("cost", texts([""] * size(batch))).copy()
    longer = {text: json.dumps([*json.loads(text or "[]"), cost]) for text in set(costs[index])}
    costs[index] = [longer[text] for text in costs[index]]
    return costs


def _isolated(stage: Stage, batch: Batch, index: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
    """The stage's output for the rows at `index`; where it raises, for ever smaller halves, down to the culprit."""
    rows = batch if len(index) == size(batch) else take(batch, index)  # media is large: no copy of what is whole
    try:
        yield index, stage(rows)
    except (UserError, WorldFault, OSError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise WorldFault(str(error)) from error
        if len(index) > 1:
            middle = len(index) // 2
            yield from _isolated(stage, batch, index[:middle])
            yield from _isolated(stage, batch, index[middle:])
            return
        kind = error.error_type if isinstance(error, SampleError) else "stage_error"
        detail = str(error) if isinstance(error, SampleError) else f"{type(error).__name__}: {error}"
        yield index, {**rows, "error_type": texts([kind]), "error": texts([detail])}


def _scatter(batch: Batch, index: np.ndarray, out: Batch) -> Batch:
    """`batch` with the columns of `out`, whose rows belong at `index`. Rows without a value get zeros or ''."""
    count = size(batch)
    if len(index) == count:
        return {**batch, **out}
    merged = dict(batch)
    for name, column in out.items():
        base = batch.get(name)
        if base is None or base.dtype != column.dtype or base.shape[1:] != column.shape[1:]:
            base = texts([""] * count) if column.dtype == object else np.zeros((count, *column.shape[1:]), column.dtype)
        else:
            base = base.copy()
        base[index] = column
        merged[name] = base
    return merged


def _with_entry(batch: Batch, entry: LedgerEntry, steps: list[Step]) -> Batch:
    """The batch with one more ledger entry, whose `steps` are of this batch; a written batch carries its ledger inside the
    result."""
    said = {**entry._asdict(), "steps": [step._asdict() for step in steps]}
    if "result" in batch:
        result = json.loads(batch["result"][0])
        result["ledger"] = [*result.get("ledger", []), said]
        return {**batch, "result": texts([json.dumps(result)])}
    ledger = batch.get("ledger", texts([""] * size(batch))).copy()
    ledger[0] = json.dumps([*json.loads(ledger[0] or "[]"), said])
    return {**batch, "ledger": ledger}


def _fault(error: Exception) -> str:
    """What the driver is told: a user's mistake in its own words, anything else with its type."""
    if isinstance(error, UserError):
        return f"user: {error}"
    if isinstance(error, OSError) and (said := refused(error)):
        where = f": {error.filename}" if error.filename else ""
        return f"user: output.uri: cannot be written ({said}{where}); free space or choose another place"
    return f"world: {type(error).__name__}: {error}"


def _faulty(number: int, fault: str) -> Batch:
    return {"batch_index": np.array([number]), "fault": texts([fault])}


def _self_test(stages: tuple[Stage, ...]) -> str:
    """Whether this hardware keeps a sample's bits whatever its slot; asked only where something is sampled."""
    if not any(stage.name == "sample" for stage in stages):
        return ""
    from models.selftest import slot_invariant

    return "bitwise" if slot_invariant() else "tolerance"


def _devices(stages: tuple[Stage, ...]) -> str:
    """Where samples are made, if this actor makes some."""
    sampling = [stage for stage in stages if stage.name == "sample"]
    others = [device for stage in sampling if hasattr(stage, "devices") for device in stage.devices()]
    return ",".join(dict.fromkeys(filter(None, [here(), *others]))) if sampling else ""


def _canary(stages: tuple[Stage, ...], batch: Batch, register: Any) -> str:
    """How the canary that these stages make differs from the first group's; empty where it does not, or none is made."""
    names, ray = {stage.name for stage in stages}, sys.modules["ray"]
    if not names & {"encode", "sample"}:
        return ""
    if "encode" not in names:
        batch = unpack(ray.get(register.encoded.remote()))
    made = taken_through(stages, batch) if batch else None
    if "sample" not in names:
        register.offer.remote(pack(made or {}))
    elif made is not None and (canary := made_of(made)) is not None:
        return str(ray.get(register.differs.remote(*canary)))
    return ""


def _slot(otherwise: str) -> tuple[str, bool]:
    """What stays the same when Ray starts this actor again, and whether it has."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return otherwise, False
    context = ray.get_runtime_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the property asks for another one that is deprecated
        return context.get_actor_id() or otherwise, bool(context.was_current_actor_reconstructed)


def _process_start() -> float:
    """When this process began, Unix seconds."""
    import psutil

    return float(psutil.Process().create_time())
