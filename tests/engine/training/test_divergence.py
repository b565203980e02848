"""A loss that explodes stops the run and says what to do; a noisy one does not."""

import math
import random

import pytest

from chunkplan.engine.training.divergence import PATIENCE, LossWatch
from chunkplan.engine.training.trainer import Diverged
from chunkplan.engine.worker import run_attempt
from tests.support.events import collector
from tests.support.runs import prepare_run

VOCABULARY = 50_000  # ln is 10.8


def first_alarm(losses, held_out=None, num_tokens=5000):
    watch = LossWatch(VOCABULARY)
    if held_out is not None:
        watch.begin(held_out, num_tokens)
    return next((update for update, loss in enumerate(losses, 1) if watch.add(loss)), None)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_an_absurd_rate_ends_a_run_as_diverged_and_says_what_to_do(tmp_path, num_chunks):
    run = prepare_run(tmp_path, learning_rate=3.0, max_steps=400, schedule={"num_chunks": num_chunks})
    events = []
    with pytest.raises(Diverged):
        run_attempt(run, collector(events), lambda: False)
    last = events[-1]
    assert (last["type"], last["reason"]) == ("failed", "diverged")
    assert last["detail"].startswith("loss is ")
    assert " and has been more than 3 above the beginning's " in last["detail"]
    assert last["detail"].endswith("lower training.learning_rate from 3, for example to 0.3")
    assert len([event for event in events if event["type"] == "step"]) < 30


def test_a_run_at_a_rate_that_is_only_too_high_goes_on(tmp_path):
    run, events = prepare_run(tmp_path, learning_rate=0.3, max_steps=40, schedule={"num_chunks": 1}), []
    assert run_attempt(run, collector(events), lambda: False) == 0
    losses = [event["loss"] for event in events if event["type"] == "step"]
    assert max(losses) > losses[0] + 2  # it did go up for a while
    assert losses[-1] < losses[0]


def test_noise_never_raises_the_alarm():
    """Single rows stray by a nat and a half; ten thousand updates, learning or not, whatever the first row
    was."""
    for seed in range(20):
        noise = random.Random(seed)
        learning = (max(0.02, 5.5 * math.exp(-i / 3000) + noise.gauss(0, 1.5)) for i in range(10_000))
        assert first_alarm(learning, held_out=noise.uniform(0.1, 7), num_tokens=20) is None
        stuck = [0.01] + [max(0.02, 4 + noise.gauss(0, 1.5)) for _ in range(10_000)]
        assert first_alarm(stuck) is None
        assert first_alarm(stuck, held_out=4.0) is None


def test_a_spike_that_passes_is_no_divergence():
    losses = [4.0] * 20 + [40.0] * (PATIENCE - 1) + [4.0] * 20 + [40.0] * (PATIENCE - 1) + [4.0]
    assert first_alarm(losses) is None
    assert first_alarm([4.0] * 20 + [40.0] * PATIENCE) == 20 + PATIENCE


def test_explosions_are_seen_from_the_first_update_on():
    assert first_alarm([5.5, 5.6, 6.0] + [11.0] * 40, held_out=5.4) == 3 + PATIENCE
    assert first_alarm([5.5] + [100.0] * 40) == 8 + PATIENCE  # eight that went wrong count for no more than guessing
    assert first_alarm([5.5 + i / 20 for i in range(200)]) is not None


def test_a_real_model_at_a_rate_a_hundred_times_too_high_is_stopped():
    """What SmolLM2-135M did in 4 chunks at a constant 0.01, from a held-out loss of 6.25 over 400 tokens."""
    losses = [6.3, 26.4, 18.1, 15.0, 17.1, 95.1, 23.4, 22.8, 13.5, 14.5, 15.5, 13.5, 10.8, 13.5, 11.1, 25.1, 22.5, 10.3]
    assert first_alarm(losses, held_out=6.25, num_tokens=400) == 1 + PATIENCE


def test_a_watch_goes_on_after_a_resume():
    watch, again = LossWatch(VOCABULARY), LossWatch(VOCABULARY)
    losses = [2.0] * 10 + [9.0] * (PATIENCE - 1)
    assert not any(watch.add(loss) for loss in losses)
    again.restore(watch.state())
    assert again.add(9.0)
