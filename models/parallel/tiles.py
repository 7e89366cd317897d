"""VAE parallel: the tiles of a tiled decode over ranks, each decoded by one of them.

Tiles overlap and are blended as `enable_tiling` of diffusers' AutoencoderKLWan does it, so that the pixels are those of one
process that decodes in tiles. A rank holds the activations of one tile at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.parallel.attention import rank_in, size_of


def split_tiles(vae: Any, group: dist.ProcessGroup | None = None) -> None:
    """Have each rank of `group` (None: of all) decode some of the tiles. Latents go in and pixels come out the same on every
    rank; a picture that fits into one tile each rank decodes by itself."""
    group = group or dist.group.WORLD

    def tiled_decode(z: Tensor, return_dict: bool = True) -> Any:
        from diffusers.models.autoencoders.vae import DecoderOutput

        made = _tiled(vae, z, group)
        return DecoderOutput(sample=made) if return_dict else (made,)

    vae.tiled_decode = tiled_decode


def _tiled(vae: Any, z: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Pixels [b, c, t, h, w] in -1..1 of latents [b, c', t', h', w']."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    batch, _, frames, height, width = z.shape
    factor, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
    size = [each // factor for each in (vae.tile_sample_min_height, vae.tile_sample_min_width)]
    step = [each // factor for each in (vae.tile_sample_stride_height, vae.tile_sample_stride_width)]
    down, across = range(0, height, step[0]), range(0, width, step[1])
    made: dict[tuple[int, int], Tensor] = {}
    places = [(top, left) for top in down for left in across]
    for number, (top, left) in enumerate(places):
        tile = z[:, :, :, top : top + size[0], left : left + size[1]]
        shape = (
            batch,
            vae.config.out_channels,
            1 + vae.config.scale_factor_temporal * (frames - 1),
            *(tile.shape[axis] * factor // patch for axis in (3, 4)),
        )
        if number % size_of(group) == rank_in(group):
            made[top, left] = _decoded(vae, tile)
            assert made[top, left].shape == shape
        else:
            made[top, left] = torch.empty(shape, dtype=z.dtype, device=z.device)
    for number, place in enumerate(places):
        made[place] = made[place].contiguous()
        dist.broadcast(made[place], dist.get_global_rank(group, number % size_of(group)), group=group)
    kept = [each * factor // patch for each in step]
    blended = [(each - stride) * factor // patch for each, stride in zip(size, step, strict=True)]
    rows = []
    for top in down:
        row = []
        for left in across:
            tile = made[top, left]
            if top:
                tile = vae.blend_v(made[top - step[0], left], tile, blended[0])
            if left:
                tile = vae.blend_h(made[top, left - step[1]], tile, blended[1])
            made[top, left] = tile
            row.append(tile[..., : kept[0], : kept[1]])
        rows.append(torch.cat(row, dim=4))
    whole = torch.cat(rows, dim=3)[..., : height * factor // patch, : width * factor // patch]
    return (unpatchify(whole, patch_size=patch) if patch > 1 else whole).clamp(-1.0, 1.0)


def _decoded(vae: Any, tile: Tensor) -> Tensor:
    """One tile, latent frame by latent frame, before patches become pixels."""
    vae.clear_cache()
    parts = []
    for at in range(tile.shape[2]):
        vae._conv_idx = [0]
        part = vae.post_quant_conv(tile[:, :, at : at + 1])
        parts.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=at == 0))
    vae.clear_cache()
    return torch.cat(parts, dim=2)
