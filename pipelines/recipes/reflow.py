"""reflow: the coupling of noise and final latent that the teacher makes, guidance folded in.

Noise is kept as its key, from which every machine draws the same bits, with a sha256 to prove it (rectified flow,
arXiv:2209.03003; InstaFlow, arXiv:2309.06380; noise by its generator's state, as in rfpp, arXiv:2405.20320).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.recipes import synthetic
from stages.batch import Stage

if TYPE_CHECKING:
    from pipelines.resolve import Resolved


def generating(run: Resolved) -> tuple[Stage, ...]:
    """Stages that use the generator, with the noise hashed."""
    return synthetic.generating(run, hash_noise=True)


judging = synthetic.judging
