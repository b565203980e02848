"""What TensorBoard shows of a run: every event's numbers, each step once, also after a crash."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from chunkplan.engine.worker import run_attempt
from tests.support.events import fields_of
from tests.support.runs import prepare_run


class Crash(Exception):
    pass


def attempt(run, crash_after=None):
    """Run an attempt in this process; returns its events."""
    events = []

    def report(event):
        events.append({"type": event.type, **fields_of(event)})
        if event.type == "step" and event.step == crash_after:
            raise Crash

    run_attempt(run, report, lambda: False)
    return events


def scalars(run):
    """(step, value) pairs by tag, as TensorBoard reads them."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def of(events, kind, field):
    return [(event["step"], pytest.approx(event[field])) for event in events if event["type"] == kind]


def test_a_crashed_and_resumed_run_shows_every_step_once(tmp_path):
    run = prepare_run(tmp_path, max_steps=16, checkpoint_every=5, eval_every=4)
    with pytest.raises(Crash):
        attempt(run, crash_after=9)
    assert [step for step, _ in scalars(run)["train/loss"]] == list(range(1, 9))
    events = attempt(run)
    assert events[1]["resumed_step"] == 5
    shown = scalars(run)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 17))
    for tag, field in (("loss", "loss"), ("learning_rate", "learning_rate"), ("grad_norm", "grad_norm")):
        assert shown[f"train/{tag}"][5:] == of(events, "step", field)
    assert [chunk for _, chunk in shown["train/chunk_index"]] == [3, 2, 1, 0] * 4
    steps = [event for event in events if event["type"] == "step"]
    highest = [max(sample["allocated_bytes"] for sample in event["samples"]) for event in steps]
    assert [value for _, value in shown["train/allocated_bytes"]][5:] == pytest.approx(highest)
    speed = [event["num_tokens"] / event["seconds"] for event in steps]
    assert [value for _, value in shown["train/tokens_per_second"]][5:] == pytest.approx(speed)
    assert [step for step, _ in shown["eval/loss"]] == [0, 4, 8, 12, 16]
    assert shown["eval/loss"][2:] == of(events, "eval", "loss")
    assert shown["eval/perplexity"][2:] == of(events, "eval", "perplexity")


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    run = prepare_run(tmp_path, max_steps=2)
    (run / "tensorboard").write_text("a file where the folder should be")
    events = attempt(run)
    assert events[-1]["reason"] == "completed"
    (warning,) = [event["detail"] for event in events if "TensorBoard" in event.get("detail", "")]
    assert warning == "no TensorBoard logs in tensorboard/: File exists"
