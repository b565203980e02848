"""Tokenized rows on disk: what is kept, when it is used again, and when it is not."""

import hashlib
import json
import os

import pytest

from chunkplan.engine.data import dataset as data
from chunkplan.engine.data import load_dataset
from chunkplan.engine.data.token_store import StoreWriter, TokenStore, permutation
from chunkplan.engine.data.tokens import IGNORE_INDEX, Encoder, Tokens
from chunkplan.engine.errors import InputError
from tests.support.tiny import tiny_tokenizer

ROWS = [Tokens([0, 5, 131_071], [IGNORE_INDEX, 5, 131_071]), Tokens([7], [IGNORE_INDEX]), Tokens([3, 2, 1], [3, 2, 1])]


def written(folder, key="key"):
    with StoreWriter(folder) as writer:
        for row in ROWS:
            writer.append(row)
        return writer.finish(key, {"note": 1})


def test_what_is_written_is_read_back(tmp_path):
    for store in (written(tmp_path / "store"), TokenStore.open(tmp_path / "store", "key")):
        assert [store[i] for i in range(len(store))] == ROWS
        assert store.lengths.tolist() == [3, 1, 3]
        assert store.facts == {"note": 1}


def test_a_store_larger_than_its_buffer_is_whole(tmp_path):
    rows = [Tokens(list(range(i, i + 1000)), list(range(i, i + 1000))) for i in range(600)]
    with StoreWriter(tmp_path / "store") as writer:
        for row in rows:
            writer.append(row)
        writer.finish("key", {})
    store = TokenStore.open(tmp_path / "store", "key")
    assert [store[i] for i in range(len(store))] == rows


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_byte(folder / "tokens.bin"),
        lambda folder: flip_a_byte(folder / "offsets.bin"),
        lambda folder: os.truncate(folder / "tokens.bin", 8),
        lambda folder: (folder / "offsets.bin").unlink(),
        lambda folder: (folder / "store.json").write_text("{"),
        lambda folder: (folder / "store.json").unlink(),
        lambda folder: (folder / "store.json").write_text("[]"),
    ],
)
def test_a_damaged_or_unfinished_store_is_none(tmp_path, damage):
    written(tmp_path / "store")
    damage(tmp_path / "store")
    assert TokenStore.open(tmp_path / "store", "key") is None
    written(tmp_path / "store")
    assert TokenStore.open(tmp_path / "store", "key") is not None


def test_a_store_made_from_something_else_is_none(tmp_path):
    written(tmp_path / "store")
    assert TokenStore.open(tmp_path / "store", "other") is None
    assert TokenStore.open(tmp_path / "nowhere", "key") is None


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the title {i} of a metal worker"}) + "\n" for i in range(50)))
    return path


@pytest.fixture
def tokenized(monkeypatch):
    """How many rows were tokenized."""
    counted, encode_all = [], Encoder.encode_all

    def counting(self, rows):
        counted.append(len(rows))
        return encode_all(self, rows)

    monkeypatch.setattr(Encoder, "encode_all", counting)
    return counted


def load(source, folder, seq_len=64, tokenizer=None, **options):
    return load_dataset(source, "auto", tokenizer or tiny_tokenizer(), seq_len, 0.1, 0, folder=folder, **options)


def test_the_same_data_is_tokenized_once(source, tmp_path, tokenized):
    first = load(source, tmp_path / "tokens")
    assert first.stats.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    again = load(source, tmp_path / "tokens")
    assert sum(tokenized) == 50
    assert list(again.train) == list(first.train)
    assert again.stats == first.stats
    packed = load(source, tmp_path / "tokens", packing=True)
    assert sum(tokenized) == 50
    assert packed.stats.num_train_tokens == first.stats.num_train_tokens


def test_other_data_settings_or_damage_tokenize_again(source, tmp_path, tokenized):
    folder = tmp_path / "tokens"
    first = load(source, folder)
    load(source, folder, seq_len=65)
    load(source, folder, seq_len=65, tokenizer=tiny_tokenizer("{{ messages[0]['content'] }}"))
    (folder / "tokens.bin").write_bytes(b"")
    load(source, folder, seq_len=65)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert load(source, folder).stats.num_rows == first.stats.num_rows + 1
    assert sum(tokenized) == 251


def test_without_a_folder_nothing_stays(source, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    splits = load(source, None)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert len(list(splits.train)) == 45


def test_a_file_that_changes_while_it_is_read_is_refused(source, tmp_path, monkeypatch):
    batches = data._batches_of

    def touching(rows):
        for batch in batches(rows):
            with source.open("a") as file:
                file.write('{"text": "late"}\n')
            yield batch

    monkeypatch.setattr(data, "_batches_of", touching)
    with pytest.raises(InputError, match=r"dataset.path: rows.jsonl changed while it was read"):
        load(source, tmp_path / "tokens")


def test_the_order_of_rows_is_frozen():
    assert permutation(8, "epoch", 3, 0).tolist() == [6, 4, 0, 7, 1, 5, 3, 2]
    assert sorted(permutation(1000, "x").tolist()) == list(range(1000))
    assert permutation(1000, "x").tolist() != permutation(1000, "y").tolist()
