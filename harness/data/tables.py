"""Captions and prompts from csv, tsv and jsonl files; see `harness.data.text` for what all text has in common.

A csv is standard: quotes around fields with separators, doubled inside. A tsv has no quoting: what stands between two tabs is the
field, quotes and all, as data sets publish it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.api import ConfigError, did_you_mean, require
from harness.data.text import checked, numbered_lines, read_text
from harness.storage import strict_json

KINDS = (".csv", ".tsv", ".jsonl", ".txt")
MAX_FIELD = 2**20
LINE = "\0line"
"""Key of a row under which '<file>, line <n>' is kept; no column can have that name."""


def read_table(path: Path, where: str) -> list[dict[str, Any]]:
    """A row per record, column -> text, of a csv or tsv with a header, or of a jsonl. where: the option that named the file."""
    kind = path.suffix.lower()
    require(kind in KINDS[:3], f"{where}: '{path}' is no table; known endings: {', '.join(KINDS[:3])}")
    text, place = read_text(path, where), f"{where}: {path}"
    if kind == ".jsonl":
        return [{**_record(line, f"{place}, line {number}"), LINE: f"{path}, line {number}"}
                for number, line in numbered_lines(text)]
    records = list(_csv_records(text, place) if kind == ".csv" else _tsv_records(text))
    if not records:
        return []
    (_, heads), *rows = records
    twice = sorted({name for name in heads if heads.count(name) > 1})
    require(not twice, f"{place}, line 1: the column '{twice[0] if twice else ''}' is there twice; rename one")
    quotes = "put quotes around text with commas" if kind == ".csv" else "a tsv has no quoting, so no field may hold a tab or " \
        "a line end; take a csv or jsonl for that"
    for number, fields in rows:
        require(len(fields) == len(heads), f"{place}, line {number}: the record has {len(fields)} fields and the header "
                f"{len(heads)}; {quotes}")
    return [{**dict(zip(heads, fields, strict=True)), LINE: f"{path}, line {number}"} for number, fields in rows]


def column(rows: list[dict[str, Any]], name: str, where: str) -> list[str]:
    """The values of a column, or ConfigError with the columns there are. where: the option that named it."""
    for row in rows:
        if name not in row:
            raise ConfigError(f"{where}: {row[LINE]}: no column '{name}'.{did_you_mean(name, names(row))}") from None
    return [checked(row[name], f"{where}: {row[LINE]}: '{name}'") for row in rows]


def names(row: dict[str, Any]) -> list[str]:
    """The columns of a row."""
    return [name for name in row if name != LINE]


def _csv_records(text: str, place: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of each record; empty lines are none."""
    csv.field_size_limit(MAX_FIELD)
    reader, began = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield began, fields
            began = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{place}, line {began}: {error}; is a quote never closed? Within quotes a quote is written twice: "
                          '"a sign that says ""Hi"""') from None


def _tsv_records(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip(" "):
            yield number, line.split("\t")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = strict_json.parse(line)
    except strict_json.Unreadable as error:
        raise ConfigError(f"{where}: {error}; write one JSON object in each line") from None
    require(isinstance(record, dict), f"{where}: expected an object such as {{\"file\": \"a.jpg\", \"caption\": \"a cat\"}}")
    require(LINE not in record, f"{where}: the key {LINE!r} is not possible; remove it")
    return record
