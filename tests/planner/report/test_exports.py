"""Timelines in the formats of other tools, judged by those tools' own code and rules."""

import json
import pickle
import pickletools

import pytest

from chunkplan.engine.errors import InputError
from chunkplan.planner import PlanRequest, plan, timeline
from chunkplan.planner.report.formats import export, trace_events
from chunkplan.planner.spec import Breakdown

TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8003,
    "max_position_embeddings": 1024,
}


def planned(gpu="rtx-4090", num_chunks=5, schedule=None, **training):
    asked = {"seq_len": 128, "micro_batch_size": 2, "schedule": {"num_chunks": num_chunks, **(schedule or {})}}
    return plan(PlanRequest.model_validate({"model": {"config": TINY}, "gpu": gpu, "training": asked | training}))


@pytest.fixture(scope="module")
def ordinary():
    return planned()


CASES = {
    "ordinary": {},
    "several updates per visit": {"schedule": {"switch_every": 3}},
    "ascending, one chunk": {"num_chunks": 1, "activation_checkpointing": "none"},
    "update in backward": {"update_in_backward": True, "max_grad_norm": None, "num_chunks": 3},
    "expansion": {"schedule": {"expansion": "factored"}},
    "lora": {"method": "lora", "num_chunks": 1},
    "masters": {"schedule": {"master": "fp32", "switch_every": 2, "states": "reset"}, "optimizer": "lion"},
}


def rounded(size_bytes):
    return -(-size_bytes // 512) * 512


def live_totals(events):
    """Allocated bytes after every event; fails where a block is freed that is not live, or allocated over
    another."""
    live, total = {}, 0
    for event in events:
        if event["action"] == "alloc":
            assert event["addr"] not in live
            live[event["addr"]] = event["size"]
            total += rounded(event["size"])
        elif event["action"] == "free_completed":
            assert live.pop(event["addr"]) == event["size"]
            total -= rounded(event["size"])
        yield total


@pytest.mark.parametrize("name", CASES)
def test_a_memory_snapshot_reaches_the_peak_of_its_plan(name):
    answer = planned(**CASES[name])
    content = pickle.loads(export(answer, "memory_snapshot"))
    over = max(live_totals(content["device_traces"][0])) - answer.peak.allocated_bytes
    assert 0 <= over < 512, "buffers are one block here"
    reserved = sum(segment["total_size"] for segment in content["segments"])
    assert reserved <= answer.peak.reserved_bytes
    categories = {event["category"] for event in content["device_traces"][0] if event["action"] == "alloc"}
    assert categories >= {"weights", "activations", "gradients", "unknown"}, "the web page wants an unknown one"


@pytest.mark.parametrize("name", CASES)
def test_the_last_chunks_snapshot_has_all_that_the_plan_reserves(name):
    answer = planned(**CASES[name])
    content = pickle.loads(export(answer, "memory_snapshot", 0))  # the last one in descending order
    assert sum(segment["total_size"] for segment in content["segments"]) == answer.peak.reserved_bytes


def test_torchs_own_tools_read_the_snapshot(ordinary):
    from torch.cuda import _memory_viz

    content = pickle.loads(export(ordinary, "memory_snapshot"))
    other = pickle.loads(export(ordinary, "memory_snapshot", 4))
    summary = _memory_viz.segsum(content)  # checks every segment's accounts
    assert f"segments: {len(content['segments'])}" in summary
    history = _memory_viz.trace(content)
    assert "cudaMalloc" in history
    assert "Device 0" in history
    kept = []
    _memory_viz.memory(content, format_flamegraph=kept.append)
    _memory_viz.segments(content, format_flamegraph=kept.append)
    _memory_viz.compare(content["segments"], other["segments"], format_flamegraph=kept.append)
    assert "plan:0:load;model.embed_tokens.weight:0:weights" in kept[0]
    for html in (_memory_viz.trace_plot(content), _memory_viz.segment_plot(content)):
        assert "MemoryViz.js" in html


def test_the_snapshot_says_where_memory_comes_from(ordinary):
    events = pickle.loads(export(ordinary, "memory_snapshot", 2))["device_traces"][0]
    stacks = {tuple(frame["filename"] + " " + frame["name"] for frame in event["frames"]) for event in events}
    assert ("layer 3 activations", "plan chunk 2 forward") in stacks
    assert any(first.endswith("optimizer_states") and then == "plan chunk 2 optimizer" for first, then in stacks)


def test_the_web_page_knows_every_opcode_of_the_snapshot(ordinary):
    """What pytorch.org/memory_viz can unpickle (its unpickle function), and the versions that it accepts."""
    known = {
        "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "EMPTY_DICT", "EMPTY_LIST", "APPEND",
        "APPENDS", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1",
        "TUPLE2", "NEWTRUE", "NEWFALSE",
    }  # fmt: skip
    content = export(ordinary, "memory_snapshot")
    used = {opcode.name: argument for opcode, argument, _ in pickletools.genops(content)}
    assert set(used) <= known
    assert used["PROTO"] == 4


def test_a_chunk_that_is_not_there_is_refused(ordinary):
    with pytest.raises(InputError, match="between 0 and 4") as failure:
        export(ordinary, "memory_snapshot", 5)
    assert failure.value.field == "chunk"
    with pytest.raises(InputError, match="only a memory snapshot"):
        export(ordinary, "perfetto", 1)


def check_trace(document):
    """The rules of the Trace Event Format (JSON object form) for the phases that are used here."""
    required = {"X": {"ts", "dur", "tid"}, "C": {"ts", "args"}, "i": {"ts", "s"}, "M": {"args"}}
    assert set(document) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    assert all(isinstance(value, str) for value in document["otherData"].values())
    stacks = {}
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid"} | required[event["ph"]] <= set(event)
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            continue
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) and value >= 0 for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
        if event["ph"] == "X":
            assert event["dur"] >= 0
            begin = stacks.get(event["tid"], 0.0)
            assert event["ts"] >= begin - 1e-3, "slices of a track must not overlap"
            stacks[event["tid"]] = event["ts"] + event["dur"]
    return stacks


@pytest.mark.parametrize("gpu", ["rtx-4090", "cpu"])
def test_a_trace_follows_the_rules_and_covers_the_cycle(gpu):
    answer = planned(gpu)
    document = json.loads(export(answer, "perfetto"))
    ends = check_trace(document)
    cycle = sum(chunk.step_seconds for chunk in answer.chunks) * 1e6
    assert set(ends) == {1, 2, 3}
    assert list(ends.values()) == pytest.approx([cycle] * 3)
    slices = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in slices if event["tid"] == 1] == [f"chunk {i}" for i in (4, 3, 2, 1, 0)]
    phases = [event["name"] for event in slices if event["tid"] == 2]
    assert phases == ["forward", "backward", "optimizer"] * 5
    for event in slices:
        if event["tid"] == 1:
            chunk = answer.chunks[event["args"]["chunk"]]
            assert event["dur"] == pytest.approx(chunk.step_seconds * 1e6)
            assert event["args"]["highest_allocated_bytes"] == chunk.peak_allocated_bytes


def test_a_traces_counters_are_the_timeline(ordinary):
    points = timeline(ordinary.request).points
    document = trace_events(ordinary, timeline(ordinary.request))
    counters = [event for event in document["traceEvents"] if event["ph"] == "C" and event["name"] == "live bytes"]
    assert len(counters) == len(points) + 1
    for event, point in zip(counters, points, strict=False):
        assert event["args"] == point.breakdown.model_dump()
        assert event["ts"] == point.seconds * 1e6
    assert set(counters[0]["args"]) == set(Breakdown.model_fields)
    allocated = [event["args"]["allocated"] for event in document["traceEvents"] if event["name"] == "allocated bytes"]
    assert max(allocated) == ordinary.peak.allocated_bytes


def test_json_is_the_timeline(ordinary):
    document = json.loads(export(ordinary, "json"))
    assert document["plan_id"] == ordinary.id
    assert max(point["allocated_bytes"] for point in document["points"]) == ordinary.peak.allocated_bytes


def test_pictures_are_the_same_for_the_same_plan(ordinary):
    svg = export(ordinary, "svg")
    assert b"<svg" in svg
    assert export(ordinary, "svg") == svg
    assert export(ordinary, "png").startswith(b"\x89PNG")
