"""trajectory: chosen states of the teacher's path from noise to final latent, with their timesteps and sigmas.

What AccVideo (arXiv:2503.19462), CausVid (arXiv:2412.07772) and Self-Forcing (arXiv:2506.08009) train on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.recipes import synthetic
from stages.batch import Stage

if TYPE_CHECKING:
    from pipelines.resolve import Resolved


def generating(run: Resolved) -> tuple[Stage, ...]:
    """Stages that use the generator, with the noise hashed and the states kept."""
    return synthetic.generating(run, hash_noise=True)


judging = synthetic.judging
