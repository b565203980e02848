"""What auto finds, what fits, and what is said about it; every figure that is named is the plan of what it
names."""

import json
import os
import subprocess
import sys

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import CheckpointedLayers, parse
from chunkplan.planner import PlanRequest, plan
from chunkplan.planner.answers.comparison import compare
from chunkplan.planner.answers.largest import largest
from chunkplan.planner.search.choose import choose
from chunkplan.planner.search.evaluator import Evaluator
from chunkplan.planner.search.front import candidates, pareto

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1009,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def request(gpu="rtx-4090", memory_limit_bytes=None, **training):
    asked = {
        "model": {"config": LLAMA},
        "gpu": gpu,
        "memory_limit_bytes": memory_limit_bytes,
        "training": {"seq_len": 64, "schedule": "auto", **training},
    }
    return parse(PlanRequest, asked)


@pytest.fixture(scope="module")
def found():
    """An automatic plan, and everything that was a candidate."""
    asked = request(micro_batch_size=2)
    planner = Evaluator(asked)
    return plan(asked), planner, candidates(planner, choose(planner))


def test_the_front_begins_with_what_was_chosen(found):
    answer, _, _ = found
    chosen, *others = answer.pareto
    assert (chosen.role, chosen.schedule, chosen.peak) == ("chosen", answer.schedule, answer.peak)
    assert chosen.training.model_copy(update={"schedule": "auto"}) == answer.request.training
    for other in others:
        better = (
            other.step_seconds < chosen.step_seconds,
            other.peak.upper_bytes < chosen.peak.upper_bytes,
            other.peak.host_bytes < chosen.peak.host_bytes,
        )
        assert any(better)
        assert other.why.count(": ") >= 1


def test_layers_keep_as_many_activations_as_fit():
    """Where all activations are too many, the layers on top keep theirs: the fastest that fits is between the
    ends."""
    config = LLAMA | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8}

    def asked(memory_limit_bytes=None, **changed):
        training = {"seq_len": 512, "micro_batch_size": 16, "schedule": {"num_chunks": 8}, **changed}
        content = {"model": {"config": config}, "gpu": "rtx-4090", "training": training}
        return parse(PlanRequest, content | {"memory_limit_bytes": memory_limit_bytes})

    full, none = (plan(asked(activation_checkpointing=choice)).peak.upper_bytes for choice in ("full", "none"))
    answer = plan(asked((full + none) // 2, schedule="auto"))
    (fastest,) = (entry for entry in answer.pareto if entry.why.startswith("the fastest that fits: "))
    layers = fastest.training.activation_checkpointing
    assert isinstance(layers, CheckpointedLayers)
    assert layers.layers == list(range(len(layers.layers)))
    assert f"activation checkpointing of the lowest {len(layers.layers)} layers only" in fastest.why
    assert 0 < len(layers.layers) < 8
    assert fastest.fits
    assert fastest.step_seconds < answer.step_seconds
    assert fastest.step_seconds <= 1.01 * min(entry.step_seconds for entry in answer.pareto)


def test_what_the_front_says_of_an_entry_is_its_plan(found):
    answer, _, _ = found
    for entry in answer.pareto:
        asked = answer.request.model_copy(update={"training": entry.training})
        again = plan(parse(PlanRequest, json.loads(asked.model_dump_json())))
        assert (again.peak, again.step_seconds, again.fits) == (entry.peak, entry.step_seconds, entry.fits)


def test_nothing_beats_the_front(found):
    _, _, outlines = found
    front = pareto(outlines)
    assert len(outlines) >= 400
    assert 0 < len(front) < len(outlines)

    def beats(one, other):
        return (
            one.least_upper_bytes <= other.least_upper_bytes
            and one.step_seconds <= other.step_seconds
            and one.host_bytes <= other.host_bytes
        )

    assert all(any(beats(one, other) for one in front) for other in outlines)
    assert not any(beats(one, other) for one in front for other in front if one is not other)


def test_candidates_are_estimated_from_above(found):
    _, planner, outlines = found
    for outline in outlines[:: len(outlines) // 6]:
        exact = planner.outline(outline.training, outline.schedule)
        is_between = isinstance(outline.training.activation_checkpointing, CheckpointedLayers)
        assert outline.allocated_bytes >= exact.allocated_bytes * (0.99 if is_between else 1)
        assert outline.host_bytes == exact.host_bytes
        assert outline.step_seconds == pytest.approx(exact.step_seconds, rel=0.1)


def test_what_stands_in_the_way_is_named_in_bytes():
    asked = request("cpu", seq_len=512, schedule={"num_chunks": 1})
    whole = plan(asked)
    limit = whole.peak.upper_bytes - 1
    (nearest,) = plan(asked.model_copy(update={"memory_limit_bytes": limit})).alternatives
    assert (nearest.role, nearest.fits) == ("nearest", True)
    assert nearest.why.startswith("nearest that fits: ")
    assert " chunks instead of 1; as asked, " in nearest.why
    assert "MiB" in nearest.why or "bytes" in nearest.why
    tiny = plan(asked.model_copy(update={"memory_limit_bytes": 2**20}))
    assert (tiny.alternatives[0].role, tiny.alternatives[0].fits) == ("smallest", False)


@pytest.mark.parametrize(
    ("field", "value", "others"), [("seq_len", 192, {"micro_batch_size": 3}), ("micro_batch_size", 9, {})]
)
def test_the_largest_that_fits_fits_and_the_next_does_not(field, value, others):
    """Near a border of the allocator's segments, which the next value or the one after it crosses."""
    training = {"schedule": {"num_chunks": 2}, **others}
    roomy = plan(request(**training | {field: value}))
    limit = roomy.peak.upper_bytes + 1000
    asked = request(memory_limit_bytes=limit, **training)
    answer = largest(asked, field)
    assert answer.plan.fits
    assert answer.value >= value
    assert getattr(answer.plan.request.training, field) == answer.value
    beyond = asked.training.model_copy(update={field: answer.value + answer.step})
    next_one = plan(asked.model_copy(update={"training": beyond}))
    assert not next_one.fits
    assert answer.limit.startswith(f"{field} {answer.value + answer.step} lacks ")
    assert str(next_one.peak.upper_bytes - limit) in answer.limit


def test_a_sequence_ends_where_the_model_does():
    answer = largest(request(schedule={"num_chunks": 2}), "seq_len")
    assert (answer.value, answer.limit) == (512, "the model has 512 positions")
    nothing = largest(request(memory_limit_bytes=2**20, schedule={"num_chunks": 2}), "seq_len")
    assert nothing.value == 0
    assert not nothing.plan.fits


def test_comparing_names_what_is_refused():
    training = request(schedule={"num_chunks": 2}).training
    found = compare({"config": LLAMA}, ["rtx-4090", "nosuch"], ["chunkft", "full"], training)
    assert [(entry.gpu, entry.method, entry.field) for entry in found] == [
        ("rtx-4090", "chunkft", None),
        ("rtx-4090", "full", None),
        ("nosuch", "chunkft", "gpu"),
        ("nosuch", "full", "gpu"),
    ]
    assert found[0].plan.peak.allocated_bytes < found[1].plan.peak.allocated_bytes
    with pytest.raises(InputError, match="nosuch"):
        compare({"config": LLAMA}, ["nosuch"], ["chunkft"], training)


ELSEWHERE = """
import sys
from chunkplan.planner import PlanRequest, plan
print(plan(PlanRequest.model_validate_json(sys.argv[1])).model_dump_json())
"""


def test_the_same_request_is_the_same_plan_elsewhere(tmp_path, found):
    """In another process, with other hash seeds and threads, and on an empty trace cache."""
    answer, _, _ = found
    environment = os.environ | {"CHUNKPLAN_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", ELSEWHERE, answer.request.model_dump_json()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(done.stdout) == answer.model_dump(mode="json")
