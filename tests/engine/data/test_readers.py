"""Every kind of file, read as a stream: what its rows are, and what the error says."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from chunkplan.engine.data import check_dataset, readers
from chunkplan.engine.data.rows import Conversation, Message, RawText, RowReader
from chunkplan.engine.errors import InputError

ROWS = {
    "messages": [{"messages": [{"role": "user", "content": f"a, \"{i}\"\nö"}, {"role": "assistant", "content": "b"}]}
                 for i in range(3)],
    "prompt_completion": [{"prompt": f"a, \"{i}\"\n", "completion": "ö"} for i in range(3)],
    "instruction": [{"instruction": f"add {i}", "input": "" if i else "1\t2", "output": "3"} for i in range(3)],
    "text": [{"text": f"ö, \"{i}\"\tb\nc"} for i in range(3)],
}  # fmt: skip


def as_table(rows, delimiter):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow([*rows[0], "id"])
    for row in rows:
        writer.writerow([*(value if isinstance(value, str) else json.dumps(value) for value in row.values()), 7])
    return out.getvalue().encode()


def as_parquet(rows):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{**row, "id": 7} for row in rows]), out, row_group_size=2)
    return out.getvalue()


WRITERS = {
    "rows.jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "rows.JSONL.gz": lambda rows: gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)),
    "array.json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode("utf-8-sig"),
    "lines.json": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "indented.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "rows.csv": lambda rows: as_table(rows, ","),
    "rows.csv.gz": lambda rows: gzip.compress(as_table(rows, ",")),
    "rows.tsv": lambda rows: as_table(rows, "\t"),
    "rows.parquet": as_parquet,
}


@pytest.mark.parametrize("format", ROWS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, format):
    expected, path = tmp_path / "expected.jsonl", tmp_path / name
    expected.write_bytes(WRITERS["rows.jsonl"](ROWS[format]))
    path.write_bytes(WRITERS[name](ROWS[format]))
    assert [row.content for row in RowReader(path)] == [row.content for row in RowReader(expected)]
    info = check_dataset(path)
    assert (info.num_rows, info.format) == (3, format)


def test_a_json_text_may_be_cut_anywhere_while_it_is_read(tmp_path, monkeypatch):
    rows = [{"text": f'a\u00f6 \\ " {"x" * (i % 7)}', "n": [1.5e-3, {"deep": None}, True]} for i in range(60)]
    path = tmp_path / "rows.json"
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(readers, "_BLOCK", block)
        for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False), "\n".join(map(json.dumps, rows))):
            path.write_text(text, encoding="utf-8")
            assert [row.values for row in readers.read_rows(path)] == rows


def test_a_text_is_read_in_blocks_that_end_where_it_pauses(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_TEXT_BLOCK", 64)
    text = "".join(f"Paragraph {i} häs two lines;\r\nthis is one.\r\n\r\n" for i in range(20)) + "y" * 300
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = list(RowReader(path))
    assert "".join(row.content.completion for row in rows) == text.replace("\r\n", "\n")
    assert all(row.content.is_running and not row.content.prompt for row in rows)
    assert all(row.content.completion.endswith("\n\n") for row in rows[:10])
    assert [row.place for row in rows[:3]] == ["line 1", "line 4", "line 7"]
    assert max(len(row.content.completion) for row in rows) <= 128


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}, {"text": 1}]', "row 2: text must be a string, found a number"),
        ("a.json", b'[{"text": "a"}, {"text": "b"', "row 2: not valid JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"}, {"text" "b"}, {"text": "' + b"c" * 99, "row 2: not valid JSON: Expecting ':'"),
        ("a.json", b'[{"text": "a"},', "row 2: not valid JSON: the file ends before its array does"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "after row 1: not valid JSON: expecting ',' or ']'"),
        ("a.json", b'[] {"text": "a"}', "after row 0: not valid JSON: something follows the array"),
        ("a.json", b'[{"text": "a"}] x', "after row 1: not valid JSON: something follows the array"),
        ("a.json", b'{"data": [{"text": "a"}]}', "row 1: needs 'messages', 'prompt' and 'completion'"),
        ("a.json", b"[3]", "row 1: must be a JSON object, found a number"),
        ("a.json", b"[" * 100_000, "row 1: not valid JSON: nested too deeply"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8: invalid start byte"),
        ("a.json", b" [ ] ", "a.json has no rows"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"text\n", "a.csv has no rows"),
        ("a.jsonl", b'[{"text": "a"}]\n', "line 1: an array begins here; name the file .json"),
        ("a.csv", b"prompt;completion\na;b\n", "line 1: the header has no ','; separate columns by it, not by ';'"),
        ("a.csv", b"text,text\na,b\n", "line 1: the header names a column twice"),
        ("a.csv", b'text,n\n"a\nb",1\n\nc\n', "line 5: 1 cells under a header of 2; quote cells with delimiters"),
        ("a.csv", b'text\na\n"b"c\n', "line 3: ',' expected after '\"'; a cell with a quote"),
        ("a.csv", b'text\na\n"b', "line 3: unexpected end of data; a cell with a quote"),
        ("a.csv", b"messages\n[{]\n", "line 2: messages: not valid JSON: Expecting property name"),
        ("a.csv", b"text\na\n\xff\n", "line 3: not UTF-8 (byte 1)"),
        ("a.tsv", b"text,n\na\n", "line 2: needs 'messages'"),
        ("a.txt", b" \n\n ", "a.txt has no rows"),
        ("a.txt", b"fine\n\xff", "after line 1: not UTF-8: invalid start byte"),
        ("a.parquet", b"PAR1 is not enough", "a.parquet is not a Parquet file that can be read: "),
        ("a.parquet.gz", b"", "Parquet is compressed by itself: unpack a.parquet.gz"),
        ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz is not a whole gzip file"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        check_dataset(path)
    assert caught.value.field == "dataset.path"
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_file_that_is_one_endless_row_is_not_held_in_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**16)
    monkeypatch.setattr(readers, "_BLOCK", 2**12)
    path = tmp_path / name
    path.write_text('{"text": "' + "x" * 2**18)
    with pytest.raises(InputError, match="longer than"):
        check_dataset(path)


def test_a_bad_parquet_row_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    table = {"text": ["a", None], "other": [1, 2]}
    parquet.write_table(pa.table(table), path)
    with pytest.raises(InputError, match="row 2: text must be a string, found null"):
        check_dataset(path)
    parquet.write_table(pa.table({"question": ["a"]}), path)
    with pytest.raises(InputError, match=r"row 1: needs 'messages', .*; found keys 'question'"):
        check_dataset(path)


def test_parquet_chats_keep_their_turns(tmp_path):
    path = tmp_path / "chats.parquet"
    chat = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "yo", "name": "x"}]
    parquet.write_table(pa.Table.from_pylist([{"messages": chat, "score": 1.0}]), path)
    assert [row.content for row in RowReader(path)] == [
        Conversation((Message("user", "hi"), Message("assistant", "yo")))
    ]
    assert next(iter(RowReader(path, "messages"))).place == "row 1"


def test_a_passage_of_a_row_is_not_a_running_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    assert next(iter(RowReader(path))).content == RawText("", "a", is_running=False)
