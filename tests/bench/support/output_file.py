"""A file that a benchmark writes at its end, tried at its start."""

from __future__ import annotations

import argparse
from pathlib import Path


def output_file(name: str) -> Path:
    """The path of an option; a line of the parser's, and exit code 2, where it cannot be written."""
    path = Path(name)
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path} cannot be written ({error.strerror}); choose another place"
        ) from error
    return path
