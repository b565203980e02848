"""Copies beside the updates: whenever they run, the result is that of copies in the order of the program."""

import pytest
import torch
from torch import nn

from chunkplan.engine import ParameterStream, activate
from chunkplan.engine.optimizer import state_layout as states
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer, OptimizerConfig
from chunkplan.engine.optimizer.state_transfer import Lane
from chunkplan.engine.spec import Master, Optimizer, StateDtype
from chunkplan.engine.stream.schedule import Schedule


class Procrastinator(Lane):
    """Two side streams at their slowest: no copy runs before somebody waits for it."""

    def __init__(self):
        super().__init__(ahead=1)
        self.pending = {}
        self.last = {"in": None, "out": None}

    def bring(self, copy, after):
        return self.later("in", copy, after)

    def send(self, copy):
        return self.later("out", copy, None)

    def later(self, stream, copy, after):
        ticket = object()
        self.pending[ticket] = copy, self.last[stream], after
        self.last[stream] = ticket
        return ticket

    def wait(self, ticket):
        if ticket in self.pending:
            copy, before, after = self.pending.pop(ticket)
            self.wait(before)
            self.wait(after)
            copy()

    def settle(self):
        self.wait(self.last["out"])


class Hasty(Lane):
    """A side stream at its fastest: copies run at once, one block ahead."""

    def __init__(self):
        super().__init__(ahead=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(states, "BLOCK_NUMEL", 256)
    monkeypatch.setattr("chunkplan.engine.optimizer.factored.BLOCK_NUMEL", 256)


OPTIONS = [
    {"states": "keep"},
    {"states": "reset"},
    {"state_dtype": StateDtype.INT8},
    {"master": Master.RESIDUAL, "state_dtype": StateDtype.BF16},
    {"master": Master.RESIDUAL, "states": "reset"},
    {"master": Master.FP32},
    {"rule": Optimizer.ADAFACTOR, "master": Master.RESIDUAL},
]


SHAPES = [(130, 10), (5,), (64, 9), (300,), (3,), (200, 11)]


def fed(config, switch_every, lane=None, num_chunks=2, num_cycles=3):
    """Random gradients fed to tensors of many sizes; one of them gets none now and then."""
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    stream = ParameterStream(nn.ParameterList(tensors))
    chunks, schedule = stream.partition(num_chunks), Schedule(num_chunks, switch_every=switch_every)
    optimizer = ChunkOptimizer(config, lane)
    for update in range(num_cycles * schedule.updates_per_cycle):
        visit = schedule.visit(update)
        with activate(nn.ParameterList(tensors), chunks[visit.chunk_index], stream) as active:
            for i, piece in enumerate(active):
                if i != 2 or update % 3:
                    piece.tensor.grad = torch.randn(piece.tensor.shape, generator=generator).bfloat16()
            optimizer.update(active, visit, 1e-2)
    return torch.cat([tensor.detach().flatten() for tensor in tensors]), optimizer


@pytest.mark.parametrize("lane", [Procrastinator, Hasty])
@pytest.mark.parametrize("switch_every", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_ahead_and_behind_change_nothing(options, switch_every, lane):
    config = OptimizerConfig(max_grad_norm=None, **options)
    plain, expected = fed(config, switch_every)
    beside, found = fed(config, switch_every, lane())
    assert torch.equal(plain, beside)
    found.settle()
    for index, chunk in expected.chunks.items():
        for key, kept in chunk.host.items():
            for name, tensor in kept.items():
                assert torch.equal(found.chunks[index].host[key][name], tensor), (index, key, name)


def test_the_device_never_holds_more_than_two_blocks_states():
    counted = []

    class Counting(Procrastinator):
        def later(self, stream, copy, after):
            counted.append((stream, len(optimizer.chunks[0].device)))
            return super().later(stream, copy, after)

    optimizer = ChunkOptimizer(OptimizerConfig(max_grad_norm=None), Counting())
    tensors = nn.ParameterList([torch.ones(200), torch.ones(1000, 2)])
    with activate(tensors, ParameterStream(tensors).partition(1)[0]) as active:
        for piece in active:
            piece.tensor.grad = torch.ones_like(piece.tensor)
        optimizer.update(active, Schedule(1).visit(0), 1e-3)
    num_blocks = 1 + 8
    assert len(optimizer.chunks[0].host) == num_blocks
    # Beside the block that is on its way. All but the first travel while another is there, also to the next
    # slice.
    assert sorted(number for stream, number in counted if stream == "in") == [0] + [1] * (num_blocks - 1)
