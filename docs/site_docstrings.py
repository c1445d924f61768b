"""Docstrings as Markdown: `random:small[-stereo][-melody]` and shapes hold brackets, which are no links there."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainBrackets(griffe.Extension):
    """Escapes what Markdown would take for a reference, outside of code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None and "][" in obj.docstring.value:
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            obj.docstring.value = "".join(p if p.startswith("`") else p.replace("][", r"]\[") for p in parts)
