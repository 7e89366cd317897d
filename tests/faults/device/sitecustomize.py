"""On the PYTHONPATH of a raylet: what its workers do with noise. DITMILL_TEST_DEVICE says what.

twisted: all noise is a little off, as on a broken device, so that samples look well and are others. worn: all that comes
after the canary is NaN. Else it is a file, to which a line is added for each sample that is begun: when, on which node, its
key.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HOW = os.environ.get("DITMILL_TEST_DEVICE", "")
LATE_SECONDS = 5.0
"""Until its workers have loaded: the first group to make its canary is taken for good."""


class _Noise(importlib.abc.MetaPathFinder):
    """Replaces `models.noise.standard_normal` once that module is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "models.noise":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            make, made = module.standard_normal, [0]

            def noted(key: str, *arguments: Any) -> Any:
                import ray

                line = f"{time.time()} {ray.get_runtime_context().get_node_id()} {key}\n"
                with Path(HOW).open("a", encoding="utf-8") as file:
                    file.write(line)
                return make(key, *arguments)

            def spoilt(*arguments: Any) -> Any:
                if not made[0]:
                    time.sleep(LATE_SECONDS)
                made[0] += 1
                return make(*arguments) * (1.001 if HOW == "twisted" else 1.0 if made[0] == 1 else float("nan"))

            module.standard_normal = spoilt if HOW in ("twisted", "worn") else noted  # type: ignore[attr-defined]

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


if HOW:
    sys.meta_path.insert(0, _Noise())
