"""Reading and checking datasets: what is accepted, and what the error says when it is not."""

import json
import subprocess
import sys

import pytest

from chunkplan.engine.data import check_dataset
from chunkplan.engine.data.rows import Conversation, Message, RawText, RowReader
from chunkplan.engine.errors import InputError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(path, *rows):
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "format", "content"),
    [
        (CHAT, "messages", Conversation((Message("user", "hi"), Message("assistant", "hello")))),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", RawText("a", "b")),
        ({"text": "a", "id": 7}, "text", RawText("", "a")),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            "instruction",
            Conversation((Message("user", "add\n\n1 2"), Message("assistant", "3"))),
        ),
        (
            {"instruction": "add", "input": None, "output": "3"},
            "instruction",
            Conversation((Message("user", "add"), Message("assistant", "3"))),
        ),
    ],
)
def test_every_format_is_recognised_and_read(tmp_path, row, format, content):
    path = write(tmp_path / "rows.jsonl", row)
    info = check_dataset(path)
    assert (info.num_rows, info.format) == (1, format)
    assert [row.content for row in RowReader(path, format)] == [content]


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf", {"text": "a"}, b"\n  \n", {"text": "b"}, b"\r\n")
    assert check_dataset(path).num_rows == 2
    assert [row.place for row in RowReader(path)] == ["line 1", "line 4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "a"\n', "line 3: not valid JSON: Expecting ',' delimiter"),
        (b'{"text": "\xff"}\n', "line 3: not UTF-8 (byte 11)"),
        (b"[" * 100_000 + b"\n", "line 3: not valid JSON: nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "line 3: not valid JSON: nested too deeply or a number too long"),
        (b'{"text": "\\ud800"}\n', "line 3: text holds half of a surrogate pair (character 1)"),
        ([1], "line 3: must be a JSON object, found a list"),
        ({"txt": "a"}, "line 3: format 'text' needs the key 'text', found keys 'txt'"),
        ({"text": 1}, "line 3: text must be a string, found a number"),
        ({}, "line 3: format 'text' needs the key 'text', found no keys"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"}, row, {"text": "c"})
    with pytest.raises(InputError) as caught:
        check_dataset(path)
    assert caught.value.field == "dataset.path"
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "'messages' must be a list of at least one message, found a string"),
        ([], "'messages' must be a list of at least one message, found an empty list"),
        (["hi"], "messages[0] must be an object with 'role' and 'content', found a string"),
        ([{"role": "user"}], "messages[0] needs the key 'content', found keys 'role'"),
        ([{"role": "bot", "content": "a"}], "messages[0].role must be one of system, user, assistant, tool"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role must be one of system, user, assistant, tool"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content must be a string, found a list"),
    ],
)
def test_a_bad_message_is_named(tmp_path, messages, message):
    path = write(tmp_path / "rows.jsonl", {"messages": messages})
    with pytest.raises(InputError, match=r"^dataset\.path: line 1: ") as caught:
        check_dataset(path)
    assert message in caught.value.message


def test_the_first_row_decides_the_format(tmp_path):
    with pytest.raises(InputError, match="line 1: needs 'messages', 'prompt' and 'completion'"):
        check_dataset(write(tmp_path / "a.jsonl", {"question": "a"}))
    with pytest.raises(InputError, match="line 2: format 'messages' needs the key 'messages', found keys 'text'"):
        check_dataset(write(tmp_path / "b.jsonl", CHAT, {"text": "a"}))


@pytest.mark.parametrize("suffix", [".arrow", ".zip", ".xlsx"])
def test_other_file_types_are_refused_by_name(tmp_path, suffix):
    with pytest.raises(InputError, match=f"cannot read {suffix} files; give JSONL, JSON, CSV, TSV, Parquet or TXT"):
        check_dataset(tmp_path / f"rows{suffix}")


def test_missing_empty_and_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"rows.jsonl does not exist"):
        check_dataset(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        check_dataset(tmp_path)
    with pytest.raises(InputError, match=r"empty.jsonl has no rows"):
        check_dataset(write(tmp_path / "empty.jsonl", b"\n"))
    with pytest.raises(InputError, match="cannot read"):
        check_dataset("rows\0.jsonl")


def test_reading_imports_no_torch(tmp_path):
    path = write(tmp_path / "rows.jsonl", CHAT)
    code = (
        "import sys; from chunkplan.engine.data import check_dataset; "
        "check_dataset(sys.argv[1]); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(path)], text=True) == "False\n"
