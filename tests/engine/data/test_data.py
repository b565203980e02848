"""Splits, batches and tensors."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from chunkplan.engine.data import Batches, Example, collate, load_dataset, with_validation
from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import DatasetSpec, parse
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def load(tmp_path):
    def run(rows, seq_len=64, eval_fraction=0.0, seed=0):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_dataset(path, "auto", tiny_tokenizer(), seq_len, eval_fraction, seed)

    return run


def test_rows_are_split_truncated_skipped_and_counted(load):
    short = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    cut = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello" * 200}]}
    lost = {"messages": [{"role": "user", "content": "hi" * 400}, {"role": "assistant", "content": "hello"}]}
    splits = load([short] * 17 + [cut] * 2 + [lost], seq_len=160, eval_fraction=0.1)
    stats = splits.stats
    assert (stats.num_rows, stats.num_train_rows, stats.num_eval_rows) == (20, 17, 2)
    assert (stats.num_truncated_rows, stats.num_skipped_rows) == (3, 1)
    assert (len(splits.train), len(splits.evaluation)) == (17, 2)
    assert max(len(example.input_ids) for example in [*splits.train, *splits.evaluation]) == 160


def test_the_split_depends_on_the_seed_alone(load):
    rows = [{"text": f"row {number}"} for number in range(100)]
    first, again, other = load(rows, 64, 0.2), load(rows, 64, 0.2), load(rows, 64, 0.2, seed=1)
    assert list(first.train) == list(again.train)
    assert first.stats == again.stats
    assert list(first.evaluation) == list(again.evaluation) != list(other.evaluation)
    held_out = {tuple(example.input_ids) for example in first.evaluation}
    assert len(held_out) == 20
    assert held_out.isdisjoint(tuple(example.input_ids) for example in first.train)


def test_at_least_one_row_is_held_out_and_one_is_trained(load):
    assert [len(s) for s in (lambda d: (d.train, d.evaluation))(load([{"text": "a b"}] * 2, 64, 0.01))] == [1, 1]
    assert load([{"text": "a b"}], 64, 0.9).stats.num_eval_rows == 0
    assert load([{"text": "a b"}] * 2, 64, 0.99).stats.num_train_rows == 1


def test_rows_of_another_file_are_what_is_held_out(load, tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [{"text": f"other {number}"} for number in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone, splits = load(rows), load([{"text": f"row {number}"} for number in range(20)])

    def validated(path, seq_len=64):
        folder = tmp_path / "tokens"
        return with_validation(splits, path, "auto", tiny_tokenizer(), seq_len, 0, folder=folder)

    held_out = validated(path)
    assert list(held_out.train) == list(splits.train)
    assert list(held_out.evaluation) == list(alone.train)
    assert (held_out.stats.num_train_rows, held_out.stats.num_eval_rows) == (20, 7)
    assert list(validated(path).evaluation) == list(held_out.evaluation)
    path.write_text('{"prompt": "a b c d", "completion": "e"}\n')
    with pytest.raises(InputError, match="has a token to train within seq_len 2") as refused:
        validated(path, seq_len=2)
    assert refused.value.field == "dataset.validation_path"


def test_a_validation_file_takes_the_place_of_a_share():
    spec = parse(DatasetSpec, {"path": "a.jsonl", "validation_path": "b.jsonl"}).normalised()
    assert spec.eval_fraction == 0
    assert parse(DatasetSpec, spec.model_dump()) == spec
    for other in ({"eval_fraction": 0.1}, {"validation_file_id": "file_1"}):
        with pytest.raises(InputError):
            parse(DatasetSpec, {"path": "a.jsonl", "validation_path": "b.jsonl"} | other)


def test_a_dataset_with_nothing_to_train_is_refused(load):
    with pytest.raises(InputError, match="none of the 2 rows has a token to train within seq_len 4"):
        load([{"prompt": "a" * 50, "completion": "b"}] * 2, seq_len=4)


def test_a_refused_conversation_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    tokenizer = tiny_tokenizer("{{ raise_exception('users may not speak') }}")
    with pytest.raises(InputError, match=r"^dataset.path: line 1: the model's chat template refuses .* may not speak"):
        load_dataset(path, "auto", tokenizer, 64, 0.0, 0)


def test_a_text_is_cut_into_pieces_and_loses_nothing(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"the title {i} of a metal worker is welder\n" for i in range(40))
    path.write_text(text)
    tokenizer = tiny_tokenizer()
    splits = load_dataset(path, "auto", tokenizer, 100, 0.0, 0)
    ids = tokenizer(text)["input_ids"]
    pieces = list(splits.train)
    assert sorted(len(example.input_ids) for example in pieces)[1:] == [100] * (len(ids) // 100)
    assert sorted(token for example in pieces for token in example.input_ids) == sorted(ids)
    assert all(example.labels == example.input_ids for example in pieces)
    assert splits.stats.num_truncated_rows == 0


def test_pieces_of_a_text_start_as_the_tokenizer_starts_a_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the title of a metal worker is welder\n" * 9)
    tokenizer = tiny_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    splits = load_dataset(path, "auto", tokenizer, 32, 0.0, 0)
    assert len(splits.train) == 3
    assert all(example.input_ids[0] == bos and bos not in example.input_ids[1:] for example in splits.train)
    assert all(example.labels == [-100, *example.input_ids[1:]] for example in splits.train)
    assert max(len(example.input_ids) for example in splits.train) == 32


def numbered(count):
    return [Example([number], [number]) for number in range(count)]


def test_an_epoch_shows_every_example_once_and_wraps_into_the_next():
    batches = Batches(numbered(10), micro_batch_size=4, seed=3)
    assert batches.num_batches_per_epoch == 3
    stream = [example.input_ids[0] for index in range(5) for example in batches.batch(index)]
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]


def test_a_batch_is_a_function_of_its_index():
    forward = [Batches(numbered(7), 3, seed=5).batch(index) for index in range(20)]
    batches = Batches(numbered(7), 3, seed=5)
    assert [batches.batch(index) for index in reversed(range(20))] == forward[::-1]
    assert [Batches(numbered(7), 3, seed=6).batch(index) for index in range(20)] != forward


def test_a_batch_may_be_larger_than_the_dataset():
    batch = Batches(numbered(3), micro_batch_size=7, seed=0).batch(0)
    assert Counter(example.input_ids[0] for example in batch[:6]) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(("length", "seq_len", "width"), [(1, 512, 64), (64, 512, 64), (65, 512, 128), (65, 100, 100)])
def test_tensors_are_padded_to_a_multiple_of_64(length, seq_len, width):
    inputs = collate([Example([5] * length, [-100] * (length - 1) + [5]), Example([6], [6])], 2, seq_len)
    assert inputs["input_ids"].shape == inputs["labels"].shape == (2, width)
    assert inputs["input_ids"][1].tolist() == [6] + [2] * (width - 1)
    assert inputs["labels"][1].tolist() == [6] + [-100] * (width - 1)
    assert inputs["labels"][0, length - 1] == 5


def test_padding_does_not_change_the_loss():
    model = tiny_llama()
    example = Example(list(range(10, 50)), list(range(10, 50)))
    padded = collate([example], pad_token_id=2, seq_len=512)
    bare = {key: value[:, :40] for key, value in padded.items()}
    assert model(**padded).loss.item() == pytest.approx(model(**bare).loss.item(), rel=1e-6)


MEMORY_SCRIPT = """
import sys
from pathlib import Path
from chunkplan.engine.data import Batches, load_dataset
from tests.support.tiny import tiny_tokenizer

small, large = map(Path, sys.argv[1:])
tokenizer = tiny_tokenizer()
load_dataset(small, "auto", tokenizer, 256, 0.1, 0, packing=True, folder=small.with_name("a"))
Path("/proc/self/clear_refs").write_text("5")
before = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
splits = load_dataset(large, "auto", tokenizer, 256, 0.1, 0, packing=True, folder=small.with_name("b"))
batches = Batches(splits.train, 8, 0)
for index in range(batches.num_batches_per_epoch):
    batches.batch(index)
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) - before)
print(splits.stats.num_train_tokens)
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    """benchmarks/data_memory.py does the same with 1 GB. Lists of these tokens would take 15 MB and more."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    rows = [
        json.dumps({"text": f"the title {i} of a metal worker is welder " * (1 + i % 19)}) + "\n" for i in range(400)
    ]
    small.write_text("".join(rows))
    with large.open("w") as file:
        for _ in range(15):
            file.writelines(rows)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(small), str(large)]
    growth_kib, num_tokens = map(int, subprocess.check_output(command, text=True, cwd=ROOT).split())
    assert num_tokens > 600_000
    assert growth_kib < 8 * 1024
