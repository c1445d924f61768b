"""The package's own exceptions; nothing else lives here, so that every layer may import it.

Wrong arguments stay `ValueError` and `TypeError`. What is wrong with files on disk is a `CheckpointError`, whose
message names the folder, what was looked for and what to do about it.
"""

from __future__ import annotations

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint or one of its side files is missing, incomplete, of another kind or refused."""
