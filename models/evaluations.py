"""What sampling costs, counted where it is paid: at the denoiser."""

from __future__ import annotations

from typing import Any


class Evaluations:
    """Counts the rows that go through the denoiser: the true cost, whatever the scheduler's order and the guidance."""

    def __init__(self, pipe: Any, teacher: Any = None) -> None:
        self.rows = 0
        found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet"))
        self.modules = [module for module in (*found, teacher) if module is not None]

    def __enter__(self) -> Evaluations:
        self._handles = [
            module.register_forward_pre_hook(self._count, with_kwargs=True, prepend=True) for module in self.modules
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self.rows += len(first)
