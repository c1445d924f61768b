"""The training configuration in an audiocraft checkpoint: YAML with OmegaConf interpolations, read without OmegaConf.

`parse_config` makes plain dicts and lists; `${a.b}`, `${.a}`, `${..a}`, `${a[0]}` and nested forms are put in, whatever
cannot be (resolvers such as `${oc.env:HOME}`, loops, names that do not exist) stays text. `Section` reads typed fields
of these and of JSON configurations, with errors that name them. Knows no field.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from ..config import MAX_DURATION
from ..errors import CheckpointError
from .pickled import plain_config

__all__ = ["Section", "parse_config", "shown"]

_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_LONGEST = 4096  # characters that a text may reach by interpolation: no file needs more, and growth is exponential
_LONGEST_YAML = 100_000  # characters; a released file has 15000, and PyYAML reads 100000 to 200000 a second
_LARGEST = 200_000  # values of a configuration with everything put in
_MISSING = "???"  # OmegaConf's mark of a value that was never given

Path = tuple[Any, ...]


def parse_config(raw: Any, label: str) -> dict[str, Any]:
    """The configuration as plain dicts: from a YAML string, a dict, or a pickled OmegaConf tree.

    Raises:
        CheckpointError: no valid YAML, or something else than a mapping.
    """
    try:
        if isinstance(raw, (str, bytes)):
            raw = _read_yaml(raw, label)
        tree = plain_config(raw)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{label} cannot be read as a configuration ({error})") from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"{label} holds a {type(tree).__name__}, expected a mapping")
    try:
        return _Resolver(tree).at(())
    except RecursionError as error:
        raise CheckpointError(f"{label} is nested too deeply") from error
    except _Unresolved as error:
        raise CheckpointError(f"{label} grows beyond {_LARGEST} values when its interpolations are put in") from error


def _read_yaml(text: str | bytes, label: str) -> Any:
    import yaml

    if len(text) > _LONGEST_YAML:
        raise CheckpointError(f"{label} has {len(text)} characters, too many for a configuration")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{label} is not valid YAML ({str(error).splitlines()[0]})") from error


class _Unresolved(Exception):
    """An interpolation that cannot be put in."""


class _Resolver:
    """Every node is resolved once; a node that is being resolved already closes a loop and stays text."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.root = root
        self.done: dict[Path, Any] = {}
        self.active: set[Path] = set()
        self.sizes: dict[int, int] = {}  # id of a container in `done` -> its values, shared ones counted every time

    def at(self, path: Path) -> Any:
        """The resolved node at `path` (keys and list positions from the root)."""
        if path in self.done:
            return self.done[path]
        if path in self.active:
            raise _Unresolved
        self.active.add(path)
        try:
            node = self._raw(path)
            if isinstance(node, dict):
                value: Any = {key: self._at_or_text((*path, key)) for key in node}
            elif isinstance(node, list):
                value = [self._at_or_text((*path, i)) for i in range(len(node))]
            else:
                value = self._expand(node, path[:-1]) if isinstance(node, str) else node
            self._measure(value, _LARGEST if not path else _LARGEST // 10)
        finally:
            self.active.discard(path)
        self.done[path] = value
        return value

    def _measure(self, value: Any, most: int) -> None:
        """_Unresolved for a container of more than `most` values: sections that hold others twice grow as 2**depth."""
        if isinstance(value, (dict, list)) and id(value) not in self.sizes:
            inside = value.values() if isinstance(value, dict) else value
            size = 1 + sum(self.sizes.get(id(each), 1) for each in inside)
            if size > most:
                raise _Unresolved
            self.sizes[id(value)] = size

    def _at_or_text(self, path: Path) -> Any:
        try:
            return self.at(path)
        except _Unresolved:
            return self._raw(path)

    def _raw(self, path: Path) -> Any:
        node: Any = self.root
        for i, key in enumerate(path):
            if isinstance(node, str) and "${" in node:  # a whole section may itself be an interpolation
                node = self._expand(node, path[: i - 1])
            if isinstance(node, dict) and key in node:
                node = node[key]
            elif isinstance(node, list) and isinstance(key, int) and 0 <= key < len(node):
                node = node[key]
            else:
                raise _Unresolved
        return node

    def _expand(self, text: str, parent: Path) -> Any:
        """`text` with its interpolations put in, innermost first; a text that is one interpolation keeps its type."""
        while (match := _INNERMOST.search(text)) is not None:
            value = self.at(self._target(match.group(1).strip(), parent))
            if match.span() == (0, len(text)):
                return value
            if isinstance(value, (dict, list)):
                raise _Unresolved
            text = text[: match.start()] + ("null" if value is None else str(value)) + text[match.end() :]
            if len(text) > _LONGEST:
                raise _Unresolved
        if "${" in text:
            raise _Unresolved
        return text

    def _target(self, name: str, parent: Path) -> Path:
        dots = len(name) - len(name.lstrip("."))
        if ":" in name or dots > len(parent) + 1:
            raise _Unresolved
        start = parent[: len(parent) - (dots - 1)] if dots else ()
        keys = [part for part in re.split(r"[.\[\]]", name[dots:]) if part]
        path = start
        for key in keys:
            node = self._container(path)
            if isinstance(node, list) and key.isdigit():
                path = (*path, int(key))
            elif isinstance(node, dict) and key not in node and key.isdigit():
                path = (*path, int(key))
            else:
                path = (*path, key)
        return path

    def _container(self, path: Path) -> Any:
        node = self._raw(path)
        return self._expand(node, path[:-1]) if isinstance(node, str) and "${" in node else node


_REQUIRED: Any = object()


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: Any) -> str:
    """A value in a message: a hostile one may have thousands of digits, or more parts than can be written out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # more digits than Python prints
        return f"{type(value).__name__} of too many digits"


class Section:
    """Typed reads of one mapping of a configuration; `label` is the file and the path of the section."""

    def __init__(self, values: dict[str, Any], label: str) -> None:
        self.values, self.label = values, label

    def name(self, key: str) -> str:
        """How messages call a field."""
        return f"{self.label}{key}"

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a field; `default` where it is missing.

        Raises:
            CheckpointError: an interpolation that could not be resolved.
        """
        value = self.values.get(key, _MISSING)
        if isinstance(value, str) and "${" in value:
            raise CheckpointError(f"{self.name(key)} is {shown(value)}, which nothing in the configuration resolves")
        if value == _MISSING:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.name(key)} is missing")
            return default
        return value

    def section(self, key: str) -> Section:
        """A mapping inside; an empty one where it is missing or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{self.name(key)} is {shown(value)}, expected a mapping")
        return Section(value or {}, f"{self.name(key)}.")

    def number(self, key: str, default: float = _REQUIRED) -> float:
        value = self.get(key, default)
        try:
            if isinstance(value, bool):
                raise TypeError
            return float(value)  # YAML reads 1e-4 as text
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.name(key)} is {shown(value)}, expected a number") from error

    def finite(self, key: str, default: float = _REQUIRED) -> float:
        value = self.number(key, default)
        if not math.isfinite(value):
            raise CheckpointError(f"{self.name(key)} is {value}, expected a finite number")
        return value

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        value = self.number(key, default)
        if not math.isfinite(value) or value != int(value):
            raise CheckpointError(f"{self.name(key)} is {shown(value)}, expected a whole number")
        return int(value)

    def positive(self, key: str, default: int = _REQUIRED, *, most: int = 1 << 20) -> int:
        """A size. `most` keeps a damaged file from asking for more layers or rows than there is memory to list."""
        value = self.integer(key, default)
        if not 1 <= value <= most:
            raise CheckpointError(f"{self.name(key)} is {value}, expected a whole number from 1 to {most}")
        return value

    def seconds(self, key: str, default: float = _REQUIRED) -> float:
        value = self.number(key, default)
        if not 0 < value <= MAX_DURATION:
            raise CheckpointError(f"{self.name(key)} is {value}, expected seconds above 0, at most {MAX_DURATION}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default))

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty where it is missing or null."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise CheckpointError(f"{self.name(key)} is {shown(value)}, expected a list of whole numbers")
        return tuple(value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; empty where it is missing, null or false."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise CheckpointError(f"{self.name(key)} is {shown(value)}, expected a list of names")
        return tuple(value)

    def refuse_unless(self, key: str, default: Any, *allowed: Any) -> None:
        """CheckpointError naming the field unless its value (`default` where missing) is one of `allowed`."""
        value = self.get(key, default)
        if not any(value is ok or (value == ok and isinstance(value, bool) == isinstance(ok, bool)) for ok in allowed):
            supported = ", ".join(map(repr, allowed))
            raise CheckpointError(f"{self.name(key)} is {shown(value)}; this package computes only {supported}")
