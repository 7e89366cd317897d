"""The models that sections of the spec name, as references that stages load."""

from __future__ import annotations

from infra.storage import Storage
from models.endpoint_client import EndpointRef
from models.multimodal import MultimodalRef
from models.source import content_sha256, resolve
from models.viewer import ViewerRef
from models.vllm import VllmRef
from pipelines.viewers import MODEL_BACKENDS, Viewer
from stages.vllm_engine import start


def viewer_of(name: str, section: Viewer | None, storage: Storage) -> ViewerRef | None:
    """The model that section `name` names; None where it names none."""
    if section is None or section.backend not in MODEL_BACKENDS:
        return None
    if section.backend == "openai":
        return EndpointRef(
            base_url=section.base_url or "",
            model=section.model,
            api_key_env=section.api_key_env,
            concurrency=section.concurrency,
            timeout=section.timeout,
            max_requests=section.max_requests,
            max_total_tokens=section.max_total_tokens,
            cache=storage,
            section=name,
        )
    path = resolve(section.model, "judge", section.revision, key=f"{name}.model")
    if section.backend == "vllm":
        return VllmRef(
            path,
            start,
            tensor_parallel_size=section.tensor_parallel_size,
            gpu_memory_utilization=section.gpu_memory_utilization,
            max_model_len=section.max_model_len,
            section=name,
        )
    return MultimodalRef(path, token_drop=section.token_drop, section=name)


def version_of(model: str, ref: ViewerRef) -> str:
    """What a row says of a model that the spec calls `model`: its name and content, or model@host."""
    return ref.name if isinstance(ref, EndpointRef) else f"{model}@{content_sha256(ref.path)[:12]}"
