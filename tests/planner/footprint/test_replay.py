"""Reserved bytes by known states are what the allocator says when every event of a cycle passes
through it.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkplan.engine.spec import Order, parse
from chunkplan.engine.stream.schedule import Schedule
from chunkplan.planner import PlanRequest
from chunkplan.planner.allocator.caching import MIB, MIN_BLOCK_BYTES, CachingAllocator
from chunkplan.planner.allocator.pool import LARGEST_SMALL, Pool, Program, units
from chunkplan.planner.footprint.block_events import CycleEvents
from chunkplan.planner.footprint.reserved import Replay, reserved_bytes
from chunkplan.planner.search.evaluator import Evaluator
from tests.planner.report.test_exports import CASES, TINY

LAYERS = {"num_hidden_layers": 12}
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 2,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 8003,
}


def planner_of(config=None, **training):
    asked = {"seq_len": 256, "micro_batch_size": 4, **training}
    model = {"config": {**TINY, **LAYERS} if config is None else config}
    return Evaluator(parse(PlanRequest, {"model": model, "gpu": "rtx-4090", "training": asked}))


class _Plain(CachingAllocator):
    """What a walk tells of every event."""

    num_events = 0

    def take(self, block, size_bytes, label):
        self.num_events += 1
        self.malloc(block, size_bytes)

    def give(self, block):
        self.num_events += 1
        self.free(block)


def walked(planner, training, schedule, chunks):
    allocator = _Plain()
    events = CycleEvents(allocator, planner.footprints(training), schedule)
    events.load(planner.overheads)
    for index in Schedule(len(chunks), schedule.order, 1).cycle_order(0):
        events.visit(chunks[index])
    return allocator


def replayed(planner, training, schedule, chunks):
    replay = Replay(planner.footprints(training), schedule)
    replay.load(planner.overheads)
    for index in Schedule(len(chunks), schedule.order, 1).cycle_order(0):
        replay.visit(chunks[index])
    return replay


MORE_CASES = {
    "layers kept and recomputed": {"activation_checkpointing": {"layers": [0, 1, 4, 7]}},
    "accumulation": {"gradient_accumulation_steps": 2},
    "adafactor": {"optimizer": "adafactor", "num_chunks": 3},
    "eager attention": {"attention": "eager", "activation_checkpointing": "none"},
    "int8, updated in backward, three per visit": {
        "update_in_backward": True, "max_grad_norm": None, "schedule": {"switch_every": 3, "state_dtype": "int8"},
    },
    "int8, tensors of many blocks": {
        "config": {**TINY, "vocab_size": 160_000, "num_hidden_layers": 4}, "num_chunks": 2,
        "schedule": {"switch_every": 3, "state_dtype": "int8"},
    },
    "experts in every other layer": {"config": EXPERTS},
    "tied, learned positions": {"config": {"model_type": "gpt2", "n_embd": 256, "n_head": 8, "n_layer": 8}},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *MORE_CASES])
def test_a_cycle_reserves_what_its_events_reserve(name):
    case = dict((CASES | MORE_CASES)[name])
    num_chunks, schedule = case.pop("num_chunks", 5), case.pop("schedule", {})
    planner = planner_of(**case, schedule={"num_chunks": num_chunks, **schedule})
    training = planner.request.training
    chunks = planner.outline(training, training.schedule).chunks
    for order in Order:
        ordered = training.schedule.model_copy(update={"order": order})
        plain = walked(planner, training, ordered, chunks)
        found = reserved_bytes(planner.footprints(training), chunks, ordered, planner.overheads)
        assert found == plain.max_reserved_bytes, order
    assert plain.max_reserved_bytes > plain.max_allocated_bytes > 0


def test_most_of_a_cycle_is_known_from_before():
    """Many layers and chunks: what makes a further schedule cheap."""
    planner = planner_of({**TINY, "num_hidden_layers": 24}, schedule={"num_chunks": 8}, seq_len=1024)
    training = planner.request.training
    chunks = planner.outline(training, training.schedule).chunks
    plain = walked(planner, training, training.schedule, chunks)
    replay = replayed(planner, training, training.schedule, chunks)
    assert replay.reserved_bytes == plain.max_reserved_bytes
    assert replay.num_simulated < plain.num_events / 2


SIZES = st.one_of(
    st.integers(1, 4 * MIN_BLOCK_BYTES),
    st.integers(1, MIB),
    st.integers(MIB, 40 * MIB),
    st.sampled_from([MIB, MIB + 1, 8 * MIB, 10 * MIB, 20 * MIB]),
)
ONCE = st.lists(st.tuples(st.one_of(st.none(), SIZES), st.integers(0, 40)), min_size=1, max_size=12)
ACTIONS = st.builds(lambda actions, times: actions * times, ONCE, st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=24), st.data())
def test_any_programs_in_any_order_reserve_what_their_events_reserve(actions, order, data):
    """Programs take blocks and give some of their own back; the rest is given back at once, now and then."""
    programs = [[_pools_ops(each) for each in actions][index % len(actions)] for index in order]
    known = {ops: Program(ops) for pair in programs for ops in pair}
    plain = CachingAllocator()
    pools = Pool(is_small=False), Pool(is_small=True)
    number, live = 0, []
    for index, pair in enumerate(programs):
        for pool, ops in zip(pools, pair, strict=True):
            names = {}
            for size, name in ops:
                if size:
                    names[name], number = number, number + 1
                    plain.malloc(names[name], size * MIN_BLOCK_BYTES)
                else:
                    plain.free(names.pop(name))
            live += names.values()
            pool.run(known[ops], index)  # every program's names are of its own place
        if data.draw(st.booleans()):
            for block in live:
                plain.free(block)
            live = []
            for pool in pools:
                pool.clear()
    assert sum(pool.reserved_bytes for pool in pools) == plain.max_reserved_bytes


def _pools_ops(actions):
    """Operations of the large pool and the small one: an action takes a block, or gives back one of those it
    took."""
    found, live = ([], []), []
    for name, (size_bytes, choice) in enumerate(actions, start=1):
        if size_bytes is not None:
            size = units(size_bytes)
            is_small = size <= LARGEST_SMALL
            found[is_small].append((size, name << 32))
            live.append((is_small, name << 32))
        elif live:
            is_small, taken = live.pop(choice % len(live))
            found[is_small].append((0, taken))
    return tuple(found[0]), tuple(found[1])
