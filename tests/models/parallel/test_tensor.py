"""Tensor parallel and guidance parallel give what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.parallel.degrees import Degrees, build_mesh
from models.parallel.guidance import GuidanceParallel
from models.parallel.tensor import load_split, split_tensors
from tests.models.parallel.ranks import on_ranks
from tests.models.parallel.test_sequence import inputs, tiny_wan


def _denoise() -> torch.Tensor:
    transformer = tiny_wan()
    with torch.no_grad():
        return transformer(**inputs(5), return_dict=False)[0]


def _split() -> tuple[torch.Tensor, int]:
    transformer = tiny_wan()
    split_tensors(transformer, build_mesh(Degrees(tensor=2))["tensor"])
    with torch.no_grad():
        made = transformer(**inputs(5), return_dict=False)[0]
    return made, _held(transformer)


def _held(transformer: Any) -> int:
    parts = [getattr(weight, "_local_tensor", weight) for weight in transformer.blocks.parameters()]
    return sum(part.numel() for part in parts)


def test_tensor_parallel_gives_what_one_process_gives_and_halves_the_blocks():
    whole = _denoise()
    both = on_ranks(2, _split)
    assert torch.equal(both[0][0], both[1][0])
    for made, held in both:
        assert (made - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert held < 0.6 * _held(tiny_wan())


def _loaded(folder: Path) -> tuple[torch.Tensor, int]:
    transformer = load_split(folder, build_mesh(Degrees(tensor=2))["tensor"], torch.float32)
    with torch.no_grad():
        return transformer(**inputs(5), return_dict=False)[0], _held(transformer)


def test_each_rank_loads_its_own_part_of_a_checkpoint(tmp_path: Path):
    tiny_wan().save_pretrained(tmp_path, safe_serialization=True)
    for (made, held), (wanted, size) in zip(on_ranks(2, _loaded, tmp_path), on_ranks(2, _split), strict=True):
        assert torch.equal(made, wanted) and held == size


def _loaded_in_half(folder: Path) -> dict[str, torch.dtype]:
    transformer = load_split(folder, build_mesh(Degrees(tensor=2))["tensor"], torch.bfloat16)
    return {name: weight.dtype for name, weight in transformer.named_parameters()}


def test_what_diffusers_keeps_exact_is_loaded_exact(tmp_path: Path):
    from diffusers import WanTransformer3DModel

    tiny_wan().save_pretrained(tmp_path, safe_serialization=True)
    whole = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    wanted = {name: weight.dtype for name, weight in whole.named_parameters()}
    assert len(set(wanted.values())) == 2
    assert on_ranks(2, _loaded_in_half, tmp_path) == [wanted, wanted]


def _guided() -> tuple[torch.Tensor, torch.Tensor, int]:
    transformer = tiny_wan()
    given = inputs(5)
    branches = (given.pop("encoder_hidden_states"), torch.zeros(2, 7, 16))
    denoise = GuidanceParallel(transformer, branches, build_mesh(Degrees(cfg=2))["cfg"].get_group())
    with torch.no_grad():
        conditional, unconditional = (denoise(**given, encoder_hidden_states=None)[0] for _ in range(2))
    return conditional, unconditional, denoise.evaluations


def test_guidance_parallel_evaluates_one_branch_a_rank():
    transformer, given = tiny_wan(), inputs(5)
    with torch.no_grad():
        conditional = transformer(**given, return_dict=False)[0]
        unconditional = transformer(**given | {"encoder_hidden_states": torch.zeros(2, 7, 16)}, return_dict=False)[0]
    for found, other, evaluations in on_ranks(2, _guided):
        assert torch.equal(found, conditional) and torch.equal(other, unconditional) and evaluations == 1
