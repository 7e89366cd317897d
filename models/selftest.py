"""Does this machine give a sample the same bits whatever its slot in the batch?

Matrix products, convolutions and attention may be blocked differently for different slots (MKL does so unless
`MKL_CBWR=AUTO,STRICT` is set before torch is imported). The answer is recorded with every run.
"""

from __future__ import annotations


def slot_invariant(device: str | None = None) -> bool:
    """True if a rolled batch gives bitwise rolled results of a linear layer, a 3-D convolution and attention."""
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        tokens = torch.randn(5, 67, 96, generator=generator).to(place)
        linear = torch.nn.Linear(96, 160).to(place)
        video = torch.randn(5, 8, 5, 16, 16, generator=generator).to(place)
        conv = torch.nn.Conv3d(8, 16, 3, padding=1).to(place)
        heads = tokens.reshape(5, 67, 4, 24).transpose(1, 2)

        def attend(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

        cases = ((linear, tokens), (conv, video), (attend, heads))
        return all(torch.equal(torch.roll(f(x), 2, 0), f(torch.roll(x, 2, 0))) for f, x in cases)
