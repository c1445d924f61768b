"""What a public docstring must say, as rules over the source: nothing is imported, so it takes a second.

Public is what docs/reference.md names, what the `__all__` of the packages and of `MODULES` export, and their public
methods and fields. A docstring may send its reader to another one ("see `generate`"), which then counts as its own.
Knows nothing of pytest; test_docstrings.py asks.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "musicgen_fast"
TOOLS = (f"{PACKAGE}.bench", f"{PACKAGE}.cli_bench")  # behind the command line: no API

# Modules that are public themselves: what they export (or define, where there is no `__all__`) is checked as well.
MODULES = (
    *("audio", "codec", "config", "errors", "loudness", "pattern", "sections", "windows"),
    *("conditioning", "conditioning.melody", "conditioning.style", "conditioning.text"),
    *("data.audio", "data.audio_utils", "models", "kernels.step"),
)

SOURCE = re.compile(
    r"\baudiocraft\b|\btransformers\b|\bITU-[RT]\b|\b[A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+)?,? \(?(?:19|20)\d\d\b"
)

SHAPE = re.compile(
    r"(?<!\w)\[(?=[^\]]*[A-Za-z1-9])[\w.*+/() -]+(?:, *[\w.*+/() -]+)*\]|\bscalars?\b|\b(?:any|same) shape\b"
)
TIMED = re.compile(r"duration|second|_rate$|_ms$|_s$|_hz$|_db$|stride|crossfade|^fade")
UNIT = re.compile(r"\bseconds?\b|\bms\b|\bframes?\b|\bsamples\b|\bk?Hz\b|\bdB(?:FS)?\b|\bLUFS\b|\bkbit/s|\bBPM\b")
REFERENCE = re.compile(r"(?:\b[Ss]ee|\b[Aa]s|\b[Aa]s (?:in|for|of)|\bthose of|\bwhat) `([\w.]+)`")
HELPER = re.compile(r"_?check(?:ed)?(?:_|$)")
FIELDED = re.compile(r"\b(?:dataclass|NamedTuple|Protocol|TypedDict)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function


# -- modules and names ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A parsed file: its dotted name, its tree, its lines."""

    name: str
    tree: ast.Module
    lines: tuple[str, ...]
    is_package: bool = False

    @staticmethod
    def parse(name: str, source: str, is_package: bool = False) -> Module:
        return Module(name, ast.parse(source), tuple(source.splitlines()), is_package)

    @property
    def doc(self) -> str:
        return ast.get_docstring(self.tree) or ""

    def statements(self) -> Iterator[ast.stmt]:
        """Of the top level, those under `if TYPE_CHECKING` too: lazy packages name their homes there."""
        for node in self.tree.body:
            yield from node.body if isinstance(node, ast.If) else [node]

    def exported(self) -> list[str]:
        """`__all__`, or every public function and class where there is none."""
        for node in self.statements():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return [name for name in ast.literal_eval(node.value)]
        own = [node.name for node in self.statements() if isinstance(node, Definition)]
        return [name for name in own if not name.startswith("_")]


@functools.cache
def module(name: str) -> Module | None:
    """A module of the package by its dotted name; None if there is no such file."""
    parts = name.split(".")
    path = ROOT.joinpath(*(parts[1:] if parts[1:2] == ["kernels"] else parts))  # installed as musicgen_fast.kernels
    for file, is_package in ((path.with_suffix(".py"), False), (path / "__init__.py", True)):
        if file.is_file():
            return Module.parse(name, file.read_text(encoding="utf-8"), is_package)
    return None


@dataclass(frozen=True)
class Item:
    """A public definition and where it stands; `owner` is the class of a method."""

    module: Module
    node: Definition
    owner: ast.ClassDef | None = None

    @property
    def name(self) -> str:
        inside = f"{self.owner.name}." if self.owner else ""
        return f"{self.module.name.removeprefix(PACKAGE + '.')}.{inside}{self.node.name}"

    @property
    def doc(self) -> str:
        """Its own docstring; of an override without one, that of the method that it overrides."""
        doc = ast.get_docstring(self.node) or ""
        if not doc and self.owner is not None:
            for base in bases(self.module, self.owner):
                for node in base.node.body:
                    if isinstance(node, Function) and node.name == self.node.name:
                        doc = doc or ast.get_docstring(node) or ""
        return doc

    @property
    def class_doc(self) -> str:
        return ast.get_docstring(self.owner) or "" if self.owner else ""


def find(where: Module, name: str, depth: int = 0) -> Item | None:
    """The class or function that `name` means in a module, through its imports from the package."""
    for node in where.statements():
        if isinstance(node, Definition) and node.name == name:
            return Item(where, node)
        if isinstance(node, ast.ImportFrom) and depth < 8:
            for alias in node.names:
                if name != (alias.asname or alias.name):
                    continue
                parts = where.name.split(".")
                base = parts[: len(parts) - node.level + where.is_package] if node.level else []
                target = module(".".join([*base, *(node.module or "").split(".")]).rstrip("."))
                if target is not None and (found := find(target, alias.name, depth + 1)):
                    return found
    return None


def referred(item: Item) -> str:
    """The docstrings that an item's own sends its reader to ("see `generate`"), but for lines about one argument."""
    out = []
    whole = re.sub(r"^(?:Args|Attributes)\b[^\n]*:\n(?:(?: [^\n]*)?(?:\n|$))*", "", item.doc, flags=re.M)
    for name in REFERENCE.findall(whole):
        owners = [item, *bases(item.module, item.owner)] if item.owner else []
        near = [Item(o.module, n, o.owner or o.node) for o in owners for n in _methods(o.owner or o.node)]  # type: ignore
        found = [i.doc for i in near if i.node.name == name and i.node is not item.node]
        home, _, last = name.rpartition(".")
        beside = module(f"{item.module.name.rpartition('.')[0]}.{home}") if home else item.module
        if not found and beside is not None and (plain := find(beside, last)):
            found = [plain.doc]
        found = found or [i.doc for key, i in public_items().items() if f".{key}".endswith(f".{name}")]
        out += found[:1]
    return "\n".join(out)


def _methods(cls: ast.AST) -> list[Function]:
    return [node for node in ast.iter_child_nodes(cls) if isinstance(node, Function)]


def bases(where: Module, cls: ast.ClassDef) -> list[Item]:
    """The base classes within the package, nearest first."""
    out = []
    for base in cls.bases:
        found = find(where, ast.unparse(base).partition("[")[0])
        if found is not None and isinstance(found.node, ast.ClassDef):
            out += [found, *bases(found.module, found.node)]
    return out


@functools.cache
def public_items() -> dict[str, Item]:
    """Everything that is checked, methods with their classes, by name."""
    names = re.findall(r"^::: ([\w.]+)", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.M)
    homes = [f"{PACKAGE}.{name}" for name in MODULES]
    for path in sorted((ROOT / PACKAGE).rglob("__init__.py")):
        homes.append(".".join(path.parent.relative_to(ROOT).parts))
    for home in homes:
        if not home.startswith(TOOLS):
            names += [f"{home}.{name}" for name in getattr(module(home), "exported", list)()]
    out: dict[str, Item] = {}
    for name in names:
        home, _, last = name.rpartition(".")
        where = module(home)
        assert where is not None, f"{name}: no such module"
        if found := find(where, last):
            out.update((item.name, item) for item in with_members(found))
    return out


def with_members(item: Item) -> Iterator[Item]:
    """A function; or a class, its public methods, and those of its bases in the package."""
    yield item
    if isinstance(item.node, ast.ClassDef):
        for cls in [item, *bases(item.module, item.node)]:
            assert isinstance(cls.node, ast.ClassDef)
            for node in cls.node.body:
                if isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__call__"):
                    if not any(
                        "overload" in ast.unparse(d) or ".setter" in ast.unparse(d) for d in node.decorator_list
                    ):
                        yield Item(cls.module, node, cls.node)


# -- rules ------------------------------------------------------------------------------------------------------------


def problems(item: Item) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong) of one definition."""
    if not item.doc:
        yield "docstring", "has none"
        return
    if isinstance(item.node, ast.ClassDef):
        yield from _class_problems(item)
    else:
        yield from _function_problems(item, item.node, f"{item.doc}\n{item.class_doc}\n{referred(item)}", item.doc)


def _class_problems(item: Item) -> Iterator[tuple[str, str]]:
    assert isinstance(item.node, ast.ClassDef)
    for cls in [item, *bases(item.module, item.node)]:
        made = [node for node in _methods(cls.node) if node.name in ("__init__", "__post_init__", "__new__")]
        for node in made:
            doc = f"{item.doc}\n{cls.doc}\n{ast.get_docstring(node) or ''}"
            yield from _function_problems(cls, node, doc, doc)
        if made:  # those of the bases are hidden, or called with less
            break
    if FIELDED.search(" ".join(ast.unparse(part) for part in (*item.node.decorator_list, *item.node.bases))):
        for part in item.node.body:
            if isinstance(part, ast.AnnAssign) and not ast.unparse(part.target).startswith("_"):
                yield from _field_problems(item, part)


def _field_problems(item: Item, field: ast.AnnAssign) -> Iterator[tuple[str, str]]:
    name = ast.unparse(field.target)
    said = _comment(item.module, field)
    text = f"{item.doc}\n{said}\n{referred(item)}"
    if not _mentioned(name, item.doc) and not said:
        yield "fields", f"says nothing of the field {name}"
    if _is_tensor(field.annotation) and not SHAPE.search(text):
        yield "shapes", f"gives no shape of the field {name}, such as [B, K, T]"
    if TIMED.search(name) and not _has_unit(name, f"{item.doc}\n{referred(item)}") and not UNIT.search(said):
        yield "units", f"gives no unit of the field {name}"


def _function_problems(item: Item, node: Function, text: str, own: str) -> Iterator[tuple[str, str]]:
    """Of a function; `text` is all that is said of it, `own` what stands at itself."""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    params = [a for a in every if a is not None and a.arg not in ("self", "cls") and not a.arg.startswith("_")]
    if len(params) > 1:
        for param in params:
            if not _mentioned(param.arg, text):
                yield "parameters", f"does not mention {param.arg}"
    if any(_is_tensor(part) for part in [node.returns, *(a.annotation for a in params)]) and not SHAPE.search(own):
        yield "shapes", "takes or returns tensors and gives no shape, such as [B, K, T]"
    for error in sorted(raised(item.module, node)):
        if not any(_mentioned(name, text) for name in _and_bases(error)):
            yield "errors", f"does not say that it raises {error}"
    for param in params:
        if TIMED.search(param.arg) and not _has_unit(param.arg, text):
            yield "units", f"gives no unit of {param.arg}"


def _mentioned(name: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _has_unit(name: str, text: str) -> bool:
    """Whether a unit stands within a hundred characters of the name: another number's unit does not count."""
    places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    return any(UNIT.search(text[max(first - 100, 0) : last + 100]) for first, last in places)


def _and_bases(error: str) -> list[str]:
    """An error and, of the built-in ones, those that it is one of: OSError says enough of FileExistsError."""
    kinds = getattr(getattr(builtins, error, None), "__mro__", ())
    return [error, *(kind.__name__ for kind in kinds if kind not in (Exception, BaseException, object))]


def _is_tensor(annotation: ast.expr | None) -> bool:
    """Whether a tensor, or a list of them, goes in or out; weights by name have no one shape."""
    if annotation is None:
        return False
    return re.search(r"\bTensor\b", re.sub(r"\b(?:dict|Mapping)\[[^\[\]]*\]", "", ast.unparse(annotation))) is not None


def _comment(where: Module, field: ast.AnnAssign) -> str:
    """What is written at a field: behind it, or in the comment lines above."""
    lines = [
        where.lines[field.lineno - 1].partition("  # ")[2],
        where.lines[(field.end_lineno or 1) - 1].partition("  # ")[2],
    ]
    above = field.lineno - 2
    while above >= 0 and where.lines[above].lstrip().startswith("#"):
        lines.append(where.lines[above])
        above -= 1
    return "\n".join(lines).strip()


def raised(where: Module, node: Function, depth: int = 0) -> set[str]:
    """The errors that a body raises itself, or through helpers named like `_check_x` and `checked_x`."""
    out: set[str] = set()
    for part in _body(node):
        if isinstance(part, ast.Raise) and part.exc is not None:
            called = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            name = ast.unparse(called).split(".")[-1]
            if name[0].isupper() and name not in ("AssertionError", "NotImplementedError", "StopIteration"):
                out.add(name)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and HELPER.match(part.func.id) and depth < 4:
            helper = find(where, part.func.id)
            if helper is not None and isinstance(helper.node, Function):
                out |= raised(helper.module, helper.node, depth + 1)
    return out


def _body(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a body but those of functions inside."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.Lambda | Definition):
            yield from _body(child)


def has_source(item: Item) -> bool:
    """Whether an object, what it refers to or its module says where its behaviour comes from."""
    return any(SOURCE.search(doc) for doc in (item.doc, referred(item), item.module.doc))
