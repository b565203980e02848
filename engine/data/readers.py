"""Training files as streams of raw rows, none of which is ever held whole. Imports no torch.

| suffix | a row |
|---|---|
| ``.jsonl``, and what is not listed here | a line that holds JSON; empty lines are no rows |
| ``.json`` | an item of one array, or one of several values that follow one another |
| ``.csv``, ``.tsv`` | a record below the header; a cell of the column ``messages`` holds JSON |
| ``.parquet`` | a row |
| ``.txt`` | a block of one running text: about 64 Ki characters that end at a blank line, a line or a word |

All but Parquet may be gzipped (``.jsonl.gz``). Text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

from chunkplan.engine.errors import InputError

FIELD = "dataset.path"
MAX_ROW_BYTES = 64 * 2**20
"""Longest row, so that no file has to be held in memory."""
COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
"""Columns that any format uses; others of a Parquet file are not read."""

_BLOCK = 2**20
_TEXT_BLOCK = 2**16
_PARQUET_BATCH_BYTES = 4 * 2**20
_UNREADABLE = {".arrow", ".feather", ".zst", ".bz2", ".xz", ".zip", ".tar", ".xlsx", ".xls", ".pdf", ".docx", ".yaml"}
_SPACE = re.compile(r"[ \t\n\r]*")
_TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB"


class RawRow(NamedTuple):
    """Where a row stands in its file (``line 3``, ``row 3``) and what it holds, unchecked."""

    place: str
    values: Any


def is_running_text(path: Path) -> bool:
    """Whether a file's rows are pieces of one text rather than documents."""
    return _suffix(path) == ".txt"


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a file, as they are read.

    Raises:
        InputError: for ``dataset.path``, on iteration: the file or one of its rows cannot be read.
    """
    suffix = _suffix(path)
    if suffix in _UNREADABLE:
        raise InputError(FIELD, f"cannot read {suffix} files; give JSONL, JSON, CSV, TSV, Parquet or TXT ({path.name})")
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        with _opened(path) as file:
            match suffix:
                case ".json":
                    yield from _json_values(file)
                case ".csv" | ".tsv":
                    yield from _records(file, "," if suffix == ".csv" else "\t")
                case ".txt":
                    yield from _text_blocks(file)
                case _:
                    yield from _json_lines(file)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(FIELD, f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(FIELD, f"{path} is a folder; give a file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(FIELD, f"{path.name} is not a whole gzip file: {error}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(FIELD, f"cannot read {path}: {reason}") from error


def bad_row(place: str, message: str) -> InputError:
    """A refusal that says where."""
    return InputError(FIELD, f"{place}: {message}")


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] != [".gz"]:
        return suffixes[-1] if suffixes else ""
    inner = suffixes[-2] if len(suffixes) > 1 else ""
    if inner == ".parquet":
        raise InputError(FIELD, f"Parquet is compressed by itself: unpack {path.name}")
    return inner


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise bad_row(f"line {number}", f"{_TOO_LONG}; is it one row per line?")
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _decoded(place: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise bad_row(place, f"not UTF-8 (byte {error.start + 1})") from error


@contextmanager
def _json_errors(place: str, what: str = "") -> Iterator[None]:
    prefix = f"{what}: " if what else ""
    try:
        yield
    except json.JSONDecodeError as error:
        raise bad_row(place, f"{prefix}not valid JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise bad_row(place, f"{prefix}not valid JSON: nested too deeply or a number too long") from error


def _json_lines(file: BinaryIO) -> Iterator[RawRow]:
    for number, line in _lines(file):
        if number == 1 and line.lstrip().startswith(b"["):
            raise bad_row("line 1", "an array begins here; name the file .json, or put one object on each line")
        if not line.isspace():
            place = f"line {number}"
            text = _decoded(place, line)
            with _json_errors(place):
                values = json.loads(text)
            yield RawRow(place, values)


def _json_values(file: BinaryIO) -> Iterator[RawRow]:
    window = _JsonWindow(file)
    is_array, number = window.takes("["), 0
    is_open = is_array and not window.takes("]")
    while is_open or not (is_array or window.is_at_end()):
        number += 1
        place = f"row {number}"
        yield RawRow(place, window.value(place))
        if is_array and not window.takes(","):
            if not window.takes("]"):
                window.fails(f"after row {number}", "expecting ',' or ']'")
            is_open = False
    if not window.is_at_end():
        window.fails(f"after row {number}", "something follows the array")


class _JsonWindow:
    """The part of a JSON text that is being parsed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._position, self._is_complete = "", 0, False

    def takes(self, character: str) -> bool:
        """Skip space, and ``character`` if it comes next; whether it did."""
        if self.is_at_end() or self._text[self._position] != character:
            return False
        self._position += 1
        return True

    def is_at_end(self) -> bool:
        """Skip space; whether nothing follows it."""
        while True:
            found = _SPACE.match(self._text, self._position)
            self._position = found.end() if found else self._position
            if self._position < len(self._text):
                return False
            if self._is_complete:
                return True
            self._extend()

    def value(self, place: str) -> Any:
        """The value that comes next, space skipped."""
        if self.is_at_end():
            self.fails(place, "the file ends before its array does")
        while True:
            with _json_errors(place):
                try:
                    value, self._position = self._parse(self._text, self._position)
                except json.JSONDecodeError as error:
                    if not self._is_cut(error):
                        row = json.JSONDecodeError(error.msg, error.doc[self._position :], error.pos - self._position)
                        raise row from error
                else:
                    return value
            if len(self._text) - self._position > MAX_ROW_BYTES:
                raise bad_row(place, _TOO_LONG)
            self._extend()

    def fails(self, place: str, message: str) -> NoReturn:
        """Refuse what follows."""
        raise bad_row(place, f"not valid JSON: {message}")

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text can mend it: what was read ends within a string, or just behind the error."""
        is_at_end = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
        return is_at_end and not self._is_complete

    def _extend(self) -> None:
        rest = self._text[self._position :]
        data = self._file.read(max(_BLOCK, len(rest)))
        self._is_complete = not data
        try:
            self._text, self._position = rest + self._decode(data, not data), 0
        except UnicodeDecodeError as error:
            raise InputError(FIELD, f"not UTF-8: {error.reason}") from error


def _records(file: BinaryIO, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = (_decoded(f"line {number}", line) for number, line in _lines(file))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise bad_row(place, f"{error}; a cell with a quote, a delimiter or a line break must be quoted") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            if len(header) == 1 and ";" in header[0]:
                raise bad_row(place, f"the header has no {delimiter!r}; separate columns by it, not by ';'")
            if len(set(header)) < len(header):
                raise bad_row(place, "the header names a column twice")
            continue
        if len(cells) != len(header):
            raise bad_row(place, f"{len(cells)} cells under a header of {len(header)}; quote cells with delimiters")
        values: dict[str, Any] = dict(zip(header, cells, strict=True))
        if "messages" in values:
            with _json_errors(place, "messages"):
                values["messages"] = json.loads(values["messages"])
        yield RawRow(place, values)


def _text_blocks(file: BinaryIO) -> Iterator[RawRow]:
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, line, is_complete = "", 1, False
    while not is_complete:
        data = file.read(_TEXT_BLOCK)
        is_complete = not data
        try:
            # A line break of Windows may lie across two reads.
            text = (text + decode(data, is_complete)).replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise bad_row(f"after line {line}", f"not UTF-8: {error.reason}") from error
        while text and (is_complete or len(text) >= 2 * _TEXT_BLOCK):
            stop = len(text) if len(text) < 2 * _TEXT_BLOCK else _last_break(text[:_TEXT_BLOCK])
            block, text = text[:stop], text[stop:]
            if not block.isspace():
                yield RawRow(f"line {line}", {"text": block})
            line += block.count("\n")


def _last_break(text: str) -> int:
    """Where a text is best cut: behind its last blank line, line or word."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark)
        if found > 0:
            return found + len(mark)
    return len(text)


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with path.open("rb") as source, parquet.ParquetFile(source, buffer_size=_BLOCK, pre_buffer=False) as file:
            names = file.schema_arrow.names
            known = [name for name in names if name in COLUMNS]
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            row_bytes = max(1, sum(sizes) // max(1, file.metadata.num_rows))
            batch_size = min(1024, max(1, _PARQUET_BATCH_BYTES // row_bytes))
            number = 0
            for batch in file.iter_batches(batch_size, columns=known or names, use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"row {number}", values)
    except (pa.ArrowException, NotImplementedError) as error:
        raise InputError(FIELD, f"{path.name} is not a Parquet file that can be read: {error}") from error
