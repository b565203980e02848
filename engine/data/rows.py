"""Training rows as users write them, in one of four formats, whatever file holds them. Imports no torch.

| format | keys | trained |
|---|---|---|
| ``messages`` | ``messages``: list of ``{role, content}`` | every assistant message |
| ``instruction`` | ``instruction``, ``output``, optional ``input`` | the output, as the answer in a chat |
| ``prompt_completion`` | ``prompt``, ``completion`` | the completion; both are raw text, no chat template |
| ``text`` | ``text`` | everything |

Other keys of a row are ignored. Files are described in chunkplan.engine.data.readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from chunkplan.engine.data.readers import FIELD, bad_row, is_running_text, read_rows
from chunkplan.engine.errors import InputError

RowFormat = Literal["messages", "prompt_completion", "instruction", "text"]
FormatChoice = Literal["auto", "messages", "prompt_completion", "instruction", "text"]

ROLES = ("system", "user", "assistant", "tool")
_REQUIRED_KEYS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat; its assistant messages are trained."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class RawText:
    """Raw text; what follows ``prompt`` is trained."""

    prompt: str
    completion: str
    is_running: bool = False
    """True for a block of a longer text, which does not end where the block does: it is cut into pieces."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset and where it stands: ``line 3`` or ``row 3``."""

    place: str
    content: Conversation | RawText


class RowReader:
    """Streams the rows of a file, checking each; ``format`` is known from the first row on.

    Args:
        path: the file.
        format: ``auto`` takes the format of the first row; every row must have the same one.

    Raises:
        InputError: on iteration, for ``dataset.path``, with the row's place where there is one.
    """

    def __init__(self, path: str | Path, format: FormatChoice = "auto") -> None:
        self.path = Path(path)
        self.format: FormatChoice = format

    def __iter__(self) -> Iterator[Row]:
        num_rows = 0
        for place, values in read_rows(self.path):
            if not isinstance(values, dict):
                raise bad_row(place, f"must be a JSON object, found {_kind(values)}")
            if self.format == "auto":
                self.format = _detect_format(place, values)
            content = parse_row(place, values, self.format)
            if isinstance(content, RawText) and is_running_text(self.path):
                content = RawText("", content.completion, is_running=True)
            yield Row(place, content)
            num_rows += 1
        if num_rows == 0:
            raise InputError(FIELD, f"{self.path.name} has no rows")


def parse_row(place: str, values: dict[str, Any], format: RowFormat) -> Conversation | RawText:
    """The content of one row.

    Raises:
        InputError: a key is missing or holds something else than its format says.
    """
    missing = [key for key in _REQUIRED_KEYS[format] if key not in values]
    if missing:
        raise bad_row(place, f"format {format!r} needs the key {missing[0]!r}, found {_names(values)}")
    match format:
        case "messages":
            return Conversation(_messages(place, values["messages"]))
        case "instruction":
            question = _text(place, "instruction", values["instruction"])
            detail = _text(place, "input", values.get("input") or "")
            answer = _text(place, "output", values["output"])
            user = f"{question}\n\n{detail}" if detail else question
            return Conversation((Message("user", user), Message("assistant", answer)))
        case "prompt_completion":
            prompt = _text(place, "prompt", values["prompt"])
            return RawText(prompt, _text(place, "completion", values["completion"]))
        case "text":
            return RawText("", _text(place, "text", values["text"]))


def _detect_format(place: str, values: dict[str, Any]) -> RowFormat:
    for name, keys in _REQUIRED_KEYS.items():
        if all(key in values for key in keys):
            return name
    expected = "'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'"
    raise bad_row(place, f"needs {expected}; found {_names(values)}")


def _messages(place: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise bad_row(place, f"'messages' must be a list of at least one message, found {_kind(value)}")
    return tuple(_message(place, f"messages[{index}]", item) for index, item in enumerate(value))


def _message(place: str, where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise bad_row(place, f"{where} must be an object with 'role' and 'content', found {_kind(value)}")
    for key in ("role", "content"):
        if key not in value:
            raise bad_row(place, f"{where} needs the key {key!r}, found {_names(value)}")
    if value["role"] not in ROLES:
        raise bad_row(place, f"{where}.role must be one of {', '.join(ROLES)} (got {str(value['role'])[:40]!r})")
    return Message(value["role"], _text(place, f"{where}.content", value["content"]))


def _text(place: str, where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise bad_row(place, f"{where} must be a string, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_row(place, f"{where} holds half of a surrogate pair (character {error.start + 1})") from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")


def _names(values: dict[str, Any]) -> str:
    keys = [repr(key[:40]) for key in values][:8]
    return ("keys " + ", ".join(keys)) if keys else "no keys"
