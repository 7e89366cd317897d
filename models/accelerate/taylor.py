"""Features forecast by a Taylor series in the step, whose derivatives are finite differences (TaylorSeer, arXiv 2503.06923).

With F computed at step s and, before, at step s - d, for each order i

    D0 = F(s),   Di = (Di-1 now - Di-1 before) / d,   F(s + k) = sum over i of Di k^i / i!

Samples may have been computed at different steps; each has its own s, d and number of known derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models.accelerate.course import Cache


class Series:
    """Of one feature [n, ...]. Its terms are kept in `cache` under (key, i), in the feature's own precision."""

    def __init__(self, order: int, cache: Cache, key: Any) -> None:
        self.order, self.cache, self.key = order, cache, key
        self.terms = 0
        self._last = self._count = torch.empty(0)
        cache.course.followers.append(self)

    def update(self, step: int, value: Tensor, rows: Tensor | None = None) -> None:
        """`value` was computed at `step`, of the samples at `rows`, or of all."""
        if self.terms == 0:
            assert rows is None
            self._last = torch.zeros(len(value), device=value.device)
            self._count = torch.zeros(len(value), device=value.device)
        everyone = torch.arange(len(self._last), device=value.device) if rows is None else rows
        apart = _along(step - self._last[everyone], value)
        known = _along(self._count[everyone], value)
        terms = [term := value]
        for at in range(min(self.terms, self.order)):
            before = self._term(at, rows)
            term = torch.where(known > at, (term - before) / apart, torch.zeros_like(term))
            terms.append(term)
        for at, each in enumerate(terms):
            if at >= self.terms and rows is not None:
                self.cache[self.key, at] = each.new_zeros(len(self._last), *each.shape[1:])
            self.cache.put((self.key, at), each, rows)
        self.terms = max(self.terms, len(terms))
        self._last[everyone] = float(step)
        self._count[everyone] += 1

    def forecast(self, step: int) -> Tensor:
        """The feature at `step`, of all samples."""
        ahead = _along(step - self._last, self._term(0, None))
        made = self._term(0, None).clone()
        for at in range(1, self.terms):
            made += self._term(at, None) * (ahead**at / math.factorial(at))
        return made

    def keep(self, rows: Tensor) -> None:
        """From now on there are these rows alone; the cache keeps their terms."""
        if self.terms:
            self._last, self._count = self._last[rows], self._count[rows]

    def _term(self, at: int, rows: Tensor | None) -> Tensor:
        term = self.cache[self.key, at]
        return term if rows is None else term.index_select(0, rows)


def _along(values: Tensor, feature: Tensor) -> Tensor:
    """[n] as it multiplies a feature [n, ...], in its precision."""
    return values.to(feature.dtype).reshape(-1, *[1] * (feature.ndim - 1))
