"""From ids to names of files that every disk takes, that stay in their folder and that no two pieces share.

An id of letters, digits, _ . and - is its own name; any other keeps what can be kept and gets a hash of the whole. A
name follows from its own line alone, so a changed manifest renames nothing; two names that some disk would take for one
(case, Unicode) are refused with both lines. Nothing is written here.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..cli_output import FORMATS, safe_name
from .item import Item, ManifestError, Problem

__all__ = [
    "FIELDS",
    "check_relative",
    "check_template",
    "file_name",
    "id_hash",
    "inside",
    "named_as",
    "numbered",
    "plan_names",
]

FIELDS: dict[str, Any] = {  # of --filename: an example of each
    "id": "id", "hash": "0123456789abcdef", "index": 0, "seed": 0, "variation": 0, "prompt": "prompt", "model": "model",
}  # fmt: skip
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a leading - would be an option of whatever reads the name
_REFUSED = re.compile(r'[<>:"\\|?*/]')
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])( *\..*)?", re.IGNORECASE)  # of Windows
_OWN = re.compile(r"summary(-\d+-of-\d+)?")  # summary.json is the run's
_MAX_ID = 100  # characters; "_123", the suffix and other fields of a template come on top
_MAX_PART, _MAX_PATH, _MAX_DEPTH = 200, 800, 8  # bytes of a name (disks take 255), bytes of a path, names in it


def id_hash(identifier: str) -> str:
    """16 hex digits of an id."""
    return hashlib.sha256(identifier.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def file_name(identifier: str, dots: bool = True) -> str:
    """A name in ASCII for an id; `dots=False` replaces those too (a tar of WebDataset ends its keys there)."""
    plain = _PLAIN.fullmatch(identifier) and len(identifier) <= _MAX_ID and not identifier.endswith(".")
    if plain and not _is_taken_by_systems(identifier) and (dots or "." not in identifier):
        return identifier
    kept = safe_name(identifier, 60).strip("-._")
    if not dots or _is_taken_by_systems(kept):  # nul.txt is the device nul, and so is nul.txt-0123
        kept = kept.replace(".", "-")
    return f"{kept or 'id'}-{id_hash(identifier)[:10]}"


def _is_taken_by_systems(name: str) -> bool:
    return bool(_DEVICES.fullmatch(name)) or bool(_OWN.fullmatch(name.casefold()))


def check_template(text: str) -> str:
    """`text` if names can be made of it; ValueError says what is wrong."""
    try:
        for _, name, _, _ in string.Formatter().parse(text):
            if name is not None and name not in FIELDS:
                raise ValueError(f"unknown field {{{name}}}; choose from {', '.join(f'{{{f}}}' for f in FIELDS)}")
        check_relative(text.format(**FIELDS))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{text!r} is no template for file names: {error}") from error
    return text


def check_relative(text: str) -> PurePosixPath:
    """A relative path with / that every system takes and that goes nowhere else; ValueError for any other."""
    parts = text.split("/")
    if not all(parts):
        raise ValueError(f"{text[:80]!r} is empty, absolute, or holds an empty name")
    for part in parts:
        if part.startswith((".", " ", "-")) or part.endswith((".", " ")) or _REFUSED.search(part):
            raise ValueError(f"{part[:80]!r} cannot be the name of a file or folder on every system")
        if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") for character in part):
            raise ValueError(f"{part[:80]!r} holds characters that cannot be seen")
        if _DEVICES.fullmatch(unicodedata.normalize("NFKC", part)) or _DEVICES.fullmatch(part):
            raise ValueError(f"{part[:80]!r} is the name of a device on Windows")
        if len(part.encode()) > _MAX_PART:
            raise ValueError(f"a name of more than {_MAX_PART} bytes")
    if len(text.encode()) > _MAX_PATH or len(parts) > _MAX_DEPTH:
        raise ValueError(f"a path of more than {_MAX_PATH} bytes or {_MAX_DEPTH} names")
    return PurePosixPath(text)


def numbered(output: str, variation: int) -> str:
    """The name that a line asks for, for one of its variations: x.wav and 2 are x_2.wav."""
    base, dot, suffix = output.rpartition(".")
    return f"{base}_{variation}.{suffix}" if base and suffix.lower() in FORMATS else f"{output}_{variation}"


def named_as(stem: str, format: str) -> str:
    """What a line has to ask for, to get this name: song.mp3 as a name of a wav file must be spelled out."""
    return f"{stem}.{format}" if stem.rpartition(".")[2].lower() in FORMATS else stem


def inside(folder: Path, stem: str) -> Path:
    """`folder / stem`; ValueError where a link leads out of the folder."""
    path = folder / stem
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} lies outside of {folder}: a folder in it is a link")
    return path


def plan_names(
    items: Iterable[Item], template: str = "{id}", *, format: str = "wav", model: str = "", dots: bool = True,
    manifest: str = "the manifest",
) -> dict[str, str]:  # fmt: skip
    """key -> path without a suffix, relative, with /, for all pieces of a manifest (not for a shard of it alone).

    A piece whose line asks for an `output` has that name. Where the template tells variations apart by neither
    {variation} nor {seed}, those behind the first get _1, _2, ...

    ManifestError: names that cannot be, or that two pieces would share.
    """
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    numbered = bool(fields & {"variation", "seed"})
    stems: dict[str, str] = {}
    problems: list[Problem] = []
    owners: dict[str, Item] = {}
    folders: dict[str, Item] = {}
    for item in items:
        try:
            stem = _stem(item, template, numbered, format, model, dots)
            path = check_relative(stem)
        except (ValueError, LookupError, TypeError) as error:
            problems.append(Problem(item.line, f"the name of its file: {error}"))
            continue
        folded = fold(stem)
        if _OWN.fullmatch(folded):
            problems.append(Problem(item.line, f"the name {stem!r} belongs to the run itself"))
        elif folded in owners:
            problems.append(Problem(item.line, _clash(item, owners[folded], stem)))
        owners.setdefault(folded, item)
        for parent in list(path.parents)[:-1]:
            folders.setdefault(fold(parent.as_posix()), item)
        stems[item.key] = stem
    for folder, item in folders.items():
        base, _, suffix = folder.rpartition(".")
        if suffix in (*FORMATS, "json", "npz") and base in owners:
            problems.append(Problem(item.line, f"its folder has the name of the file of line {owners[base].line}"))
    if problems:
        raise ManifestError(manifest, problems)
    return stems


def _clash(item: Item, other: Item, stem: str) -> str:
    hint = "a --filename with {hash} or {seed} tells them apart" if item.output is None else "give it another output"
    return f"the name {stem!r} is that of line {other.line} too, at least on disks that know no case; {hint}"


def _stem(item: Item, template: str, numbered: bool, format: str, model: str, dots: bool) -> str:
    if item.output is not None:
        base, _, suffix = item.output.rpartition(".")
        if base and suffix.lower() in FORMATS:
            if suffix.lower() != format:
                raise ValueError(f"{item.output[:80]!r} is no name for a {format} file")
            return base
        if not dots and "." in item.output.rpartition("/")[2]:
            raise ValueError(f"{item.output[:80]!r} holds a dot, where WebDataset ends the key")
        return item.output
    name = template.format(**_values(item, model, dots))
    name = name.removesuffix(f".{format}")
    return name if numbered or not item.variation else f"{name}_{item.variation}"


def _values(item: Item, model: str, dots: bool) -> Mapping[str, Any]:
    texts = {"id": file_name(item.id, dots), "prompt": safe_name(item.prompt), "model": safe_name(model)}
    if not dots:
        texts = {name: text.replace(".", "-") for name, text in texts.items()}
    return {
        **texts, "hash": id_hash(item.id), "index": item.index, "seed": item.seed, "variation": item.variation,
    }  # fmt: skip


def fold(name: str) -> str:
    """What a disk that knows neither case nor Unicode's forms makes of a name."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return unicodedata.normalize("NFKC", folded)
