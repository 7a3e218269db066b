"""Captions and prompts from csv, tsv, jsonl and txt files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from harness.api import ConfigError, did_you_mean, require

KINDS = (".csv", ".tsv", ".jsonl", ".txt")
MAX_FIELD = 2**20


def read_table(path: Path, where: str) -> list[dict[str, str]]:
    """A row per record, column -> text, of a csv or tsv with a header, or of a jsonl. where: the option that named the file."""
    require(path.suffix in KINDS[:3], f"{where}: '{path}' is no table; known endings: {', '.join(KINDS[:3])}")
    text = read_text(path, where)
    if path.suffix == ".jsonl":
        return [_record(line, f"{where}: {path}, line {number}") for number, line in enumerate(text.splitlines(), 1)
                if line.strip()]
    csv.field_size_limit(MAX_FIELD)
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ConfigError(f"{where}: {path}, line {reader.line_num}: {error}; is a quote never closed?") from None
    for number, row in enumerate(rows, 2):
        require(None not in row and None not in row.values(), f"{where}: {path}, record {number}: its number of fields is not "
                f"that of the header, {len(reader.fieldnames or [])}; put quotes around text with separators")
    return rows


def read_text(path: Path, where: str) -> str:
    """The text of a UTF-8 file."""
    require(path.is_file(), f"{where}: no file at '{path}'")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: '{path}' is not UTF-8 text ({error}); save it as UTF-8") from None


def column(rows: list[dict[str, str]], name: str, where: str) -> list[str]:
    """The values of a column, or ConfigError with the columns there are. where: the option that named it."""
    for row in rows:
        if name not in row:
            raise ConfigError(f"{where}: no column '{name}'.{did_you_mean(name, list(row))}") from None
        require(isinstance(row[name], str), f"{where}: '{name}' holds {row[name]!r}, which is no text")
    return [row[name] for row in rows]


def _record(line: str, where: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from None
    require(isinstance(record, dict), f"{where}: expected an object such as {{\"file\": \"a.jpg\", \"caption\": \"a cat\"}}")
    return record
