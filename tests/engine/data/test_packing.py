"""Rows that share a sequence: how they are packed, and that none sees another."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chunkplan.engine.data.packing import pack
from chunkplan.engine.spec import RunSpec
from chunkplan.engine.training.trainer import Trainer
from tests.support.events import pairs
from tests.support.runs import prepare_run


def rows_of(packing):
    return [packing.members[a:b].tolist() for a, b in zip(packing.bounds, packing.bounds[1:], strict=False)]


def plain_best_fit(lengths, capacity):
    """The textbook's rule, one row at a time."""
    sequences = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [s for s in sequences if s[0] >= lengths[row]]
        if not fitting:
            sequences.append(fitting := [capacity, []])
            fitting = [fitting]
        best = min(fitting, key=lambda s: s[0])
        best[0] -= lengths[row]
        best[1].append(row)
    return sequences


@pytest.mark.parametrize(
    ("seed", "count", "low", "capacity"), [(0, 1, 2, 9), (1, 40, 1, 10), (2, 300, 2, 64), (3, 500, 90, 128)]
)
def test_packing_is_best_fit_decreasing(seed, count, low, capacity):
    lengths = np.random.RandomState(seed).randint(low, capacity + 1, count).astype(np.int64)
    packed = rows_of(pack(lengths, capacity))
    assert sorted(row for sequence in packed for row in sequence) == list(range(count))
    assert all(lengths[sequence].sum() <= capacity for sequence in packed)
    expected = plain_best_fit(lengths.tolist(), capacity)
    assert sorted(capacity - lengths[sequence].sum() for sequence in packed) == sorted(s[0] for s in expected)


def test_packing_is_the_same_every_time_and_fills_what_rows_leave():
    lengths = np.array([6, 4, 4, 3, 3, 2, 10, 8], dtype=np.int64)
    assert rows_of(pack(lengths, 10)) == rows_of(pack(lengths, 10)) == [[6], [7, 5], [0, 1], [2, 3, 4]]


def test_a_million_rows_are_packed_in_a_moment():
    lengths = np.random.RandomState(0).gamma(2.0, 150.0, 1_000_000).astype(np.int64).clip(2, 2048)
    packing = pack(lengths, 2048)
    assert len(packing.members) == 1_000_000
    assert lengths.sum() / (len(packing) * 2048) > 0.999


def test_no_rows_take_no_sequences():
    packing = pack(np.zeros(0, dtype=np.int64), 64)
    assert len(packing) == 0
    assert rows_of(packing) == []


def train(run_dir, stops=()):
    """Run to the end, in attempts that end after the given updates; the events of the last attempt."""
    run = RunSpec.model_validate_json((run_dir / "job.json").read_text())
    for stop in (*stops, None):
        events = []
        trainer = Trainer(run, run_dir, pairs(events), lambda: False)
        trainer.stop_requested = lambda trainer=trainer, stop=stop: trainer.tuner.num_updates == stop
        assert trainer.train() == ("completed" if stop is None else "stopped")
    return events


def test_a_packed_run_resumes_where_it_was_and_says_how_dense_it_is(tmp_path):
    runs = [prepare_run(tmp_path / name, rows=60, packing=True, max_steps=7, micro_batch_size=2) for name in "ab"]
    events = [train(runs[0]), train(runs[1], stops=(2, 5))]
    whole, resumed = (load_file(run / "artifacts" / "tuned" / "model.safetensors") for run in runs)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    started = [fields for kind, fields in events[1] if kind == "started"]
    dataset = started[0]["dataset"]
    assert started[0]["resumed_step"] == 5
    assert dataset["num_train_rows"] == 54
    assert dataset["num_packed_sequences"] * 64 * dataset["packing_density"] == pytest.approx(
        dataset["num_train_tokens"]
    )
    assert dataset["num_packed_sequences"] < 54
    evaluations = [[fields["loss"] for kind, fields in found if kind == "eval"] for found in events]
    assert evaluations[0][-1] == evaluations[1][-1]


def test_a_packed_run_without_held_out_rows_trains_to_its_end(tmp_path):
    run = prepare_run(tmp_path, rows=20, packing=True, max_steps=4)
    job = json.loads((run / "job.json").read_text())
    (run / "job.json").write_text(json.dumps(job | {"eval_fraction": 0.0}))
    events = train(run)
    started = next(fields for kind, fields in events if kind == "started")
    assert (started["dataset"]["num_train_rows"], started["dataset"]["num_eval_rows"]) == (20, 0)
    assert not [kind for kind, _ in events if kind == "eval"]
    assert (run / "artifacts" / "tuned" / "model.safetensors").is_file()
