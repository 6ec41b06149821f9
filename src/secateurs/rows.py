"""Rows of files (JSON, CSV, Parquet, text) or of the hub. All untrusted; an error names the place. No torch."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from secateurs.hub import HUB, hub_rows

ROWS_AT_ONCE = 1024
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def read_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file with its place, as in `file:12`: all but Parquet may be gzipped (`.jsonl.gz`).

    JSON is an object a line or, in `.json`, an array of objects. A text is cut at blank lines, and each paragraph is a
    row {"text": ...}. A `path` that starts with `hub:` is a data set there (`hub.py`). ValueError for a
    file that is not there, is of no known kind (by its name) or is damaged.
    """
    if str(path).startswith(HUB):
        yield from hub_rows(str(path))
        return
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in KINDS or (kind == ".parquet" and path.suffix == ".gz"):
        raise ValueError(f"{path}: not a known kind of file; known are {', '.join(KINDS)}, and .gz of all but Parquet")
    if kind == ".parquet":
        yield from _parquet(path)
        return
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="") as lines:
            yield from {".txt": _paragraphs, ".csv": _csv, ".json": _json}.get(kind, _json_lines)(path, lines)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: damaged, or not UTF-8 text ({error})") from None


def _json(path: Path, lines: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """An array of objects; or lines, which some call so too."""
    text = lines.read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, io.StringIO(text))
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array ({error})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: not a JSON object")
        yield f"{path}, row {number}", row


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a JSON object")
        yield f"{path}:{number}", row


def _csv(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(lines)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"{path}:{reader.line_num}: not as many fields as the first line names")
        yield f"{path}:{reader.line_num}", row


def _paragraphs(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate(lines, start=1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line.strip())
        elif paragraph:
            yield f"{path}:{start}", {"text": "\n".join(paragraph)}
            paragraph = []
    if paragraph:
        yield f"{path}:{start}", {"text": "\n".join(paragraph)}


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged or not a Parquet file ({str(error).splitlines()[0]})") from None
