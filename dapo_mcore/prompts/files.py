"""Rows of .jsonl and .parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from dapo_mcore.prompts.problem import RowFault

Row = dict[str, Any]
ROWS_AT_ONCE = 1_024


def rows_of(file: str) -> Iterator[tuple[int, Row | RowFault]]:
    """(number, row) of each row, or what is wrong with it. Numbers count from 1: for .jsonl they are line numbers.

    Raises:
        ValueError: the file is missing, of another kind, or no parquet file.
    """
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    path = Path(file)
    if path.suffix not in readers:
        raise ValueError(f"{file}: neither .jsonl nor .parquet; convert the file")
    if not path.is_file():
        raise ValueError(f"{file}: no such file; correct the path")
    return readers[path.suffix](path)


def _jsonl(path: Path) -> Iterator[tuple[int, Row | RowFault]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_row(line.removeprefix(b"\xef\xbb\xbf"))  # a byte order mark, from an editor


def _json_row(line: bytes) -> Row | RowFault:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return RowFault("not UTF-8")
    except (ValueError, RecursionError):
        return RowFault("not JSON")
    return row if isinstance(row, dict) else RowFault("not a JSON object {...}")


def _parquet(path: Path) -> Iterator[tuple[int, Row | RowFault]]:
    try:
        with parquet.ParquetFile(path) as table:
            number = 1
            for batch in table.iter_batches(ROWS_AT_ONCE):
                yield from enumerate(_batch_rows(batch), start=number)
                number += batch.num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error}); write or download the file again") from error


def _batch_rows(batch: pyarrow.RecordBatch) -> list[Row] | list[Row | RowFault]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_parquet_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _parquet_row(batch: pyarrow.RecordBatch) -> Row | RowFault:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return RowFault("not UTF-8")
