"""vLLM by Ray: the engine stage of `ray.data.llm`, called from within an actor that judges.

`ray.data.llm.build_processor` would make it a Ray Data operator of its own, a row a prompt. What is asked of a clip depends
on what it answered before (a screen settles it, a verifier asks statements back, what came out poorly is asked again), and a
batch must stay one block that fails, is timed and is committed as one. So the stage's callable class is what is taken: Ray's
engine, its bound on pending requests, its ways of failing; and the graph stays as it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from infra.errors import UserError
from models.chat import explain
from models.vllm import Engine, VllmRef

if TYPE_CHECKING:
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

COLUMN = "__data"
ENDLESS = 1 << 20
"""Rows of a batch, as Ray is told: it warns of few, and nothing else depends on it."""
USUAL = 0.9
"""Of the share of a GPU that an actor has, how much vLLM takes for weights, keys and values."""


def start(ref: VllmRef) -> Engine:
    """vLLM with the model of `ref`, on the GPUs of this process.

    UserError where it is not installed, there are too few GPUs, or it knows no such model.
    """
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{ref.section}.backend: vllm is not installed where the worker runs ({explain(error)}); run pip install --group"
            " vllm there, or use transformers"
        ) from error
    _check_gpus(ref)
    from ray.llm._internal.common.errors import VLLM_CLIENT_ERRORS

    try:
        return _RayEngine(ref)
    except (ValueError, *VLLM_CLIENT_ERRORS) as error:  # what vLLM says of arguments and of models
        raise UserError(f"{ref.section}.model: {ref.path}: vLLM cannot hold it ({explain(error)})") from error


def engine_kwargs(ref: VllmRef, share: float) -> dict[str, Any]:
    """Arguments of vLLM's engine; `share` of each GPU is this process's."""
    return {
        "enable_prefix_caching": True,
        "tensor_parallel_size": ref.tensor_parallel_size,
        # Processes of this machine: Ray's own would ask for GPUs beside those that the actor holds.
        "distributed_executor_backend": "mp" if ref.tensor_parallel_size > 1 else "uni",
        "gpu_memory_utilization": ref.gpu_memory_utilization or USUAL * min(1.0, share),
        "max_model_len": ref.max_model_len,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "disable_log_stats": True,
    }


class _RayEngine:
    """One engine, and the event loop that it lives in: vLLM's belongs to the loop it first answered in."""

    def __init__(self, ref: VllmRef) -> None:
        from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        logging.getLogger("ray.llm").setLevel(logging.WARNING)  # a line a call
        self._stage: vLLMEngineStageUDF = vLLMEngineStageUDF(
            data_column=COLUMN,
            expected_input_keys=["sampling_params"],
            batch_size=ENDLESS,
            max_concurrent_batches=1,
            model=ref.path,
            engine_kwargs=engine_kwargs(ref, _share()),
            should_continue_on_error=True,
            log_engine_metrics=False,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()

    def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return asyncio.run_coroutine_threadsafe(self._answers(requests), self._loop).result()

    async def _answers(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        async for out in self._stage({COLUMN: requests}):
            answers += out[COLUMN]
        return answers


def _check_gpus(ref: VllmRef) -> None:
    import torch

    if (found := torch.cuda.device_count()) == 0:
        raise UserError(
            f"{ref.section}.backend: vllm needs a GPU where the worker runs, found none; use transformers, or openai with a"
            " server elsewhere"
        )
    if found < ref.tensor_parallel_size:
        raise UserError(
            f"{ref.section}.tensor_parallel_size: expected at most the {found} GPUs of the actor, found"
            f" {ref.tensor_parallel_size}; set compute.resources.judge.gpus to {ref.tensor_parallel_size}"
        )


def _share() -> float:
    """Of each of its GPUs, how much is this process's: what its actor asked Ray for; all, outside of Ray."""
    import ray

    if not ray.is_initialized():
        return 1.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0))
