"""95% intervals: how sure a measured share is, or any other figure of a sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Z = 1.96


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Interval of a share, `right` of `asked`."""
    if not asked:
        return 0.0, 1.0
    share = right / asked
    middle = share + Z * Z / (2 * asked)
    spread = Z * ((share * (1 - share) + Z * Z / (4 * asked)) / asked) ** 0.5
    scale = 1 + Z * Z / asked
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(
    figure: Callable[..., float], *columns: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of `figure(*columns)`, from rows drawn again with replacement. Draws without a figure (NaN) are left out."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    count = len(columns[0])
    found = [figure(*(column[rows] for column in columns)) for rows in rng.integers(count, size=(draws, count))]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
