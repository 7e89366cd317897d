"""VAE parallel gives what one process gives that decodes in tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.parallel.tiles import split_tiles
from tests.models.parallel.ranks import on_ranks


def _vae(patch: int | None) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    side = patch or 1
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=patch,
        in_channels=3 * side**2,
        out_channels=3 * side**2,
        scale_factor_spatial=4 * side,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    tile = 4 * vae.spatial_compression_ratio
    vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
    return vae


def _latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, height, width, generator=torch.Generator().manual_seed(1))


def _decode(patch: int | None, height: int, width: int) -> tuple[torch.Tensor, int]:
    vae = _vae(patch)
    split_tiles(vae)
    calls = []
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        return vae.decode(_latents(height, width)).sample, len(calls)


@pytest.mark.parametrize(("patch", "ranks"), [(None, 2), (2, 2), (None, 4)])
def test_tiles_over_ranks_are_the_pixels_of_one_process(patch: int | None, ranks: int):
    with torch.no_grad():
        alone = _vae(patch).decode(_latents(7, 6)).sample
    made = on_ranks(ranks, _decode, patch, 7, 6)
    for pixels, _ in made:
        torch.testing.assert_close(pixels, alone, rtol=0, atol=1e-5)
    assert sum(calls for _, calls in made) == 3 * 3 * 2  # latent frames, rows and columns of tiles: each once
    assert max(calls for _, calls in made) == 3 * -(-6 // ranks)


def test_what_fits_into_one_tile_is_decoded_by_each_rank():
    with torch.no_grad():
        alone = _vae(None).decode(_latents(4, 3)).sample
    for pixels, calls in on_ranks(2, _decode, None, 4, 3):
        assert torch.equal(pixels, alone)
        assert calls == 3
