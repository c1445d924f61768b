"""Rows of a manifest: lines of JSONL, records of CSV and TSV, or prompts of a text, one a line.

Lines are read as bytes and cut at a limit, so that a file without line ends fills no memory. What cannot be read is
reported with the number of its line, from 1, and reading goes on.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from .fields import is_field
from .item import Limits

__all__ = ["FORMATS", "read_rows"]

FORMATS = ("jsonl", "csv", "tsv", "txt")
Report = Callable[[int, str], None]
Rows = Iterator[tuple[int, Mapping[str, Any]]]


def _lines(file: BinaryIO, limits: Limits, report: Report) -> Iterator[tuple[int, str]]:
    """(number, text without its end) of the lines; what is too long or not UTF-8 is reported and left out."""
    number = 0
    while raw := file.readline(limits.line_bytes + 2):
        number += 1
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        text = raw.rstrip(b"\r\n")
        if len(text) > limits.line_bytes:
            while not raw.endswith(b"\n") and (raw := file.readline(2**20)):
                pass
            report(number, f"has more than {limits.line_bytes} bytes")
            continue
        try:
            yield number, text.decode("utf-8")
        except UnicodeDecodeError as error:
            report(number, f"is not UTF-8 at byte {error.start}")


def read_rows(file: BinaryIO, format: str, limits: Limits, report: Report, ignore_extra: bool = False) -> Rows:
    """(line, field -> value) of every row; what cannot be read goes to `report(line, message)`.

    Values of jsonl have types, all others are texts. Columns of csv and tsv that no field is called are reported once.
    """
    lines = _lines(file, limits, report)
    if format == "jsonl":
        return _json_rows(lines, report)
    if format == "txt":
        return ((number, {"prompt": text.strip()}) for number, text in lines if text.strip())
    return _csv_rows(lines, "," if format == "csv" else "\t", limits, report, ignore_extra)


def _json_rows(lines: Iterator[tuple[int, str]], report: Report) -> Rows:
    for number, text in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_no_twins, parse_constant=_no_constant)
        except RecursionError:
            report(number, "is nested too deeply")
        except json.JSONDecodeError as error:
            report(number, f"is not JSON: {error.msg} at column {error.colno}")
        except ValueError as error:  # twins, NaN, a number of thousands of digits
            report(number, f"is not JSON: {error}")
        else:
            if isinstance(row, dict):
                yield number, row
            else:
                report(number, f"expected an object in braces, got a {type(row).__name__}")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin[:60]!r} stands in it twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _csv_rows(
    lines: Iterator[tuple[int, str]], delimiter: str, limits: Limits, report: Report, ignore_extra: bool
) -> Rows:
    """Records by the names of the first one. A record counts for the line that it starts on."""
    at = [0, 0, 0]  # line read last, where its record began, characters of the record

    def feed() -> Iterator[str]:
        for number, text in lines:
            at[0] = number
            at[1] = at[1] or number
            at[2] += len(text) + 1
            if at[2] > limits.line_bytes:
                raise csv.Error(f"the record has more than {limits.line_bytes} characters: is a quote left open?")
            yield text + "\n"

    header: list[str] | None = None
    unknown: set[str] = set()
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        at[1:] = [0, 0]
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            report(at[1] or at[0], f"cannot be read: {error}")
            if at[2] > limits.line_bytes:  # `feed` is over; what comes behind would be read inside of the quotes
                break
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = cells
            if twins := sorted({name for name in header if header.count(name) > 1}):
                report(at[1], f"the column {twins[0][:60]!r} stands there twice")
            unknown = {name for name in header if name.strip() and not is_field(name)}
            if not ignore_extra:
                for name in sorted(unknown):
                    report(at[1], f"unknown column {name[:60]!r} (--ignore-extra passes over such columns)")
            continue
        if len(cells) > len(header):
            report(at[1], f"has {len(cells)} cells, the header {len(header)}; put texts with {delimiter!r} in quotes")
            continue
        row = zip(header, cells, strict=False)
        yield at[1], {name: cell for name, cell in row if name not in unknown and (name.strip() or cell.strip())}
