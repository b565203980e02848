"""Training rows as users write them: one JSON object per line, in one of four formats. Imports no torch.

| format | keys | trained |
|---|---|---|
| ``messages`` | ``messages``: list of ``{role, content}`` | every assistant message |
| ``instruction`` | ``instruction``, ``output``, optional ``input`` | the output, as the answer in a chat |
| ``prompt_completion`` | ``prompt``, ``completion`` | the completion; both are raw text, no chat template |
| ``text`` | ``text`` | everything |

Other keys of a row are ignored, and so are empty lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.errors import InputError

RowFormat = Literal["messages", "prompt_completion", "instruction", "text"]
FormatChoice = Literal["auto", "messages", "prompt_completion", "instruction", "text"]

ROLES = ("system", "user", "assistant", "tool")
FIELD = "dataset.path"
_REQUIRED_KEYS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_UNREADABLE_SUFFIXES = {".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst", ".zip"}


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat; its assistant messages are trained."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Passage:
    """Raw text; what follows ``prompt`` is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset and the 1-based line it stands on."""

    line: int
    content: Conversation | Passage


class RowReader:
    """Streams the rows of a JSONL file, checking each; ``format`` and ``sha256`` are known once it is exhausted.

    Args:
        path: the file.
        format: ``auto`` takes the format of the first row; every row must have the same one.

    Raises:
        InputError: on iteration, for ``dataset.path``, with the line's number where there is one.
    """

    def __init__(self, path: str | Path, format: FormatChoice = "auto") -> None:
        self.path = Path(path)
        self.format: FormatChoice = format
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes read so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        self._digest = hashlib.sha256()
        num_rows = 0
        for line, data in self._lines():
            values = _parse_line(line, data)
            if self.format == "auto":
                self.format = _detect_format(line, values)
            yield Row(line, parse_row(line, values, self.format))
            num_rows += 1
        if num_rows == 0:
            raise InputError(FIELD, f"{self.path.name} has no rows")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        suffix = self.path.suffix.lower()
        if suffix in _UNREADABLE_SUFFIXES:
            raise InputError(
                FIELD, f"cannot read {suffix} files; give JSONL, one JSON object per line ({self.path.name})"
            )
        try:
            with self.path.open("rb") as file:
                for line, data in enumerate(file, start=1):
                    self._digest.update(data)
                    if data.strip():
                        yield line, data
        except FileNotFoundError:
            raise InputError(FIELD, f"{self.path} does not exist") from None
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error


def parse_row(line: int, values: dict[str, Any], format: RowFormat) -> Conversation | Passage:
    """The content of one row, already known to be a JSON object.

    Raises:
        InputError: a key is missing or holds something else than its format says.
    """
    missing = [key for key in _REQUIRED_KEYS[format] if key not in values]
    if missing:
        raise _wrong(line, f"format {format!r} needs the key {missing[0]!r}, found {_names(values)}")
    match format:
        case "messages":
            return Conversation(_messages(line, values["messages"]))
        case "instruction":
            question = _text(line, "instruction", values["instruction"])
            detail = _text(line, "input", values.get("input") or "")
            answer = _text(line, "output", values["output"])
            user = f"{question}\n\n{detail}" if detail else question
            return Conversation((Message("user", user), Message("assistant", answer)))
        case "prompt_completion":
            prompt = _text(line, "prompt", values["prompt"])
            return Passage(prompt, _text(line, "completion", values["completion"]))
        case "text":
            return Passage("", _text(line, "text", values["text"]))


def _parse_line(line: int, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _wrong(line, f"not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise _wrong(line, f"not valid JSON: {error.msg} (column {error.colno})") from error
    except (RecursionError, ValueError) as error:
        raise _wrong(line, "not valid JSON: nested too deeply or a number too long") from error
    if not isinstance(values, dict):
        raise _wrong(line, f"must be a JSON object, found {_kind(values)}")
    return values


def _detect_format(line: int, values: dict[str, Any]) -> RowFormat:
    for name, keys in _REQUIRED_KEYS.items():
        if all(key in values for key in keys):
            return name
    expected = "'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'"
    raise _wrong(line, f"needs {expected}; found {_names(values)}")


def _messages(line: int, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(line, f"'messages' must be a list of at least one message, found {_kind(value)}")
    return tuple(_message(line, f"messages[{index}]", item) for index, item in enumerate(value))


def _message(line: int, where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise _wrong(line, f"{where} must be an object with 'role' and 'content', found {_kind(value)}")
    for key in ("role", "content"):
        if key not in value:
            raise _wrong(line, f"{where} needs the key {key!r}, found {_names(value)}")
    if value["role"] not in ROLES:
        raise _wrong(line, f"{where}.role must be one of {', '.join(ROLES)} (got {str(value['role'])[:40]!r})")
    return Message(value["role"], _text(line, f"{where}.content", value["content"]))


def _text(line: int, where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(line, f"{where} must be a string, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _wrong(line, f"{where} holds half of a surrogate pair (character {error.start + 1})") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def _names(values: dict[str, Any]) -> str:
    keys = [repr(key[:40]) for key in values][:8]
    return ("keys " + ", ".join(keys)) if keys else "no keys"


def _wrong(line: int, message: str) -> InputError:
    return InputError(FIELD, f"line {line}: {message}")


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, IsADirectoryError):
        return InputError(FIELD, f"{path} is a folder; give a JSONL file")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(FIELD, f"cannot read {path}: {reason}")
