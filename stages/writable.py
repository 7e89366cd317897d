"""What may stand in a row: valid Unicode and finite numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stages.batch import Batch, SampleError


def valid(text: str) -> str:
    """`text` with a question mark for what is no valid Unicode."""
    return text.encode("utf-8", "replace").decode()


def is_plain(batch: Batch) -> bool:
    """Whether all text is valid Unicode and no number but a finite one can be in it: then no row has to be looked at."""
    for name, column in batch.items():
        if name in ("text", "negative_text", "encoded"):  # files
            continue
        if column.dtype == object:
            text = "\n".join(map(str, column))
            try:
                text.encode()
            except UnicodeEncodeError:
                return False
            if any(word in text for word in ("NaN", "Infinity", "\\ud")):  # the last is half a character, in JSON
                return False
        elif column.ndim == 1 and not np.isfinite(column).all():
            return False
    return True


def check_writable(value: Any, where: str) -> None:
    """Raise SampleError for text that is no Unicode and for numbers that are not finite, however deep."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"{error.reason} at character {error.start}"
            raise SampleError("bad_text", f"{where}: expected valid Unicode, found {found}") from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise SampleError("bad_number", f"{where}: expected a finite number, found {value}")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_writable(key, where)
            check_writable(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            check_writable(item, f"{where}[{at}]")
