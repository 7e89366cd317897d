"""What of a sample is stored, read off its row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from infra.storage import Storage
from infra.tables import read_dataset_json
from pipelines.kept import told

Role = Literal["latents", "noise", "trajectory"]


def kept_media(row: Mapping[str, Any]) -> bool:
    """Whether the row's media are there: of what was rejected a preview may be all that is."""
    return any(item["role"] != "preview" for item in row["media"] or ())


def kept_tensor(row: Mapping[str, Any], role: Role) -> Mapping[str, Any] | None:
    """The row's reference to the tensor of this role; None where it was not kept."""
    return next((item for item in row["tensors"] or () if item["role"] == role), None)


def kept_timesteps(row: Mapping[str, Any]) -> list[float] | None:
    """Timesteps of the kept states of the row's path; None where there are none."""
    path = told(row).get("trajectory")
    return None if path is None else path["timesteps"]


def kept_dtype(reference: Mapping[str, Any]) -> str:
    """The numpy dtype that holds a tensor without loss: float16, or float32 (numpy has no bfloat16)."""
    return "float16" if reference["dtype"] == "float16" else "float32"


def text_dtype(storage: Storage) -> str:
    """The same of the dataset's text embeddings."""
    tensors = read_dataset_json(storage).get("tensors") or {}
    return "float16" if tensors.get("text_embeddings") == "float16" else "float32"


def text_ids(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Ids of the kept embeddings of the row's prompt and of its negative prompt; None where there are none."""
    said = told(row)
    return said.get("text_id"), said.get("negative_text_id")


def kept_nbytes(row: Mapping[str, Any]) -> int:
    """Bytes of the row's media and tensors as they are stored."""
    return sum(item["nbytes"] or 0 for item in (*(row["media"] or ()), *(row["tensors"] or ())))
