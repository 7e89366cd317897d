"""How far a prediction is from its target: mean square, or pseudo-Huber.

Pseudo-Huber as in "Improving the Training of Rectified Flows" (arXiv 2405.20320), there for a sample of d numbers
sqrt(|x|^2 + c^2) - c with c = 0.00054 sqrt(d). Divided by sqrt(d), so that it does not grow with the latent's size, this is
sqrt(mean(x^2) + h^2) - h with h = 0.00054: the square of a small difference, the absolute value of a large one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Distance = Literal["squared", "pseudo_huber"]
HUBER = 0.00054


def distances(difference: torch.Tensor, kind: Distance, huber: float = HUBER) -> torch.Tensor:
    """[B] of differences [B, ...]."""
    square = difference.flatten(1).square().mean(1)
    return square if kind == "squared" else (square + huber**2).sqrt() - huber
