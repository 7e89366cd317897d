"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one clear line that names the key, what was found and the mend. The command exits with 2."""
