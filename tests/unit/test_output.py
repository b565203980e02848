"""Units and sizes as the command line prints and reads them."""

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.service.cli.output import count, duration, gibibytes, number, percent
from chunkplan.service.cli.progress import describe
from chunkplan.service.cli.requests import model_reference, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1024", 1024),
        ("12GiB", 12 << 30),
        ("12.5 gib", 25 << 29),
        ("12G", 12 * 10**9),
        ("500MB", 500 * 10**6),
        ("1Ki", 1024),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes("memory_limit_bytes", text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "12Q", "1e9", "12 i"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"^memory_limit_bytes: must be a size"):
        parse_bytes("memory_limit_bytes", text)


def test_units():
    assert [gibibytes(n) for n in (0, 512, 870 << 20, 25 << 29)] == ["0 B", "512 B", "870.0 MiB", "12.50 GiB"]
    assert [duration(s) for s in (None, 0.517, 42.4, 200, 7512)] == ["-", "0.52 s", "42 s", "3 min 20 s", "2 h 05 min"]
    assert [count(n) for n in (None, 950, 134_515_008, 8_030_261_248)] == ["-", "950", "134.5 M", "8.03 B"]
    assert (number(None), number(1.5), percent(None), percent(-0.0123)) == ("-", "1.5000", "-", "-1.23%")


def test_models_are_names_or_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert model_reference("llama-3-8b") == "llama-3-8b"
    assert model_reference("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
    assert model_reference("org/model") == {"path": "org/model"}
    assert model_reference("./missing") == {"path": "missing"}
    assert model_reference("/models/a/config.json") == {"path": "/models/a"}


def test_the_start_of_a_run_says_what_became_of_the_rows():
    dataset = {"num_train_rows": 285, "num_eval_rows": 15, "num_truncated_rows": 0, "num_skipped_rows": 0}
    event = {"total_steps": 14, "num_chunks": 2, "resumed_step": 0, "dataset": dataset}
    assert describe("started", event) == ["started: 14 updates over 2 chunks, 285 rows to train, 15 held out"]
    dataset |= {"num_truncated_rows": 3, "num_skipped_rows": 1, "num_packed_sequences": 53, "packing_density": 0.9504}
    assert describe("started", event | {"resumed_step": 4}) == [
        "started: 14 updates over 2 chunks, 285 rows to train, 15 held out, 3 cut off at seq_len, 1 skipped; "
        "packed into 53 sequences, 95.0% full, resumed after update 4"
    ]
    adapter = {"num_chunks": 1, "num_parameters": 139_000_000, "num_trainable_parameters": 4_884_480}
    (line,) = describe("started", event | adapter)
    assert line.startswith("started: 14 updates of 4.9 M parameters, 285 rows")
