"""Copies beside the updates: whenever they run, the result is that of copies in the order of the program."""

import pytest
import torch
from torch import nn

from engine import ParameterStream, activate, states
from engine.optimizer import ChunkOptimizer, OptimizerConfig
from engine.schedule import Schedule
from engine.spec import Master, Optimizer, StateDtype
from engine.transfer import Lane
from tests.engine.updates import gradients, random_weight, run


class Procrastinator(Lane):
    """A side stream at its slowest: no copy runs before somebody waits for it."""

    def __init__(self):
        super().__init__(ahead=1)
        self.pending = []
        self.num_done = 0
        self.num_copies = 0

    def run(self, copy):
        self.pending.append(copy)
        self.num_copies += 1
        return self.num_copies

    def wait(self, ticket):
        while self.num_done < ticket:
            self.pending.pop(0)()
            self.num_done += 1

    def settle(self):
        self.wait(self.num_copies)


class Hasty(Lane):
    """A side stream at its fastest: copies run at once, one block ahead."""

    def __init__(self):
        super().__init__(ahead=1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(states, "BLOCK_NUMEL", 256)
    monkeypatch.setattr("engine.factored.BLOCK_NUMEL", 256)


OPTIONS = [
    {"states": "keep"},
    {"states": "reset"},
    {"state_dtype": StateDtype.INT8},
    {"master": Master.RESIDUAL, "state_dtype": StateDtype.BF16},
    {"master": Master.RESIDUAL, "states": "reset"},
    {"master": Master.FP32},
    {"rule": Optimizer.ADAFACTOR, "master": Master.RESIDUAL},
]


@pytest.mark.parametrize("lane", [Procrastinator, Hasty])
@pytest.mark.parametrize("switch_every", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_ahead_and_behind_change_nothing(options, switch_every, lane):
    config = OptimizerConfig(max_grad_norm=None, **options)
    weight = random_weight((130, 10)).bfloat16()  # two chunks of three blocks, the last smaller
    updates = gradients(6 * switch_every, (130, 10))
    plain, expected = run(config, weight, updates, 2, switch_every)
    beside, found = run(config, weight, updates, 2, switch_every, lane=lane())
    assert torch.equal(plain, beside)
    found.settle()
    for index, chunk in expected.chunks.items():
        for key, kept in chunk.host.items():
            for name, tensor in kept.items():
                assert torch.equal(found.chunks[index].host[key][name], tensor), (index, key, name)


def test_the_device_never_holds_more_than_two_blocks_states():
    counted = []

    class Counting(Procrastinator):
        def run(self, copy):
            counted.append(len(optimizer.chunks[0].device))
            return super().run(copy)

    config = OptimizerConfig(max_grad_norm=None)
    optimizer = ChunkOptimizer(config, Counting())
    layer = nn.Linear(10, 256, bias=False)
    with activate(layer, ParameterStream(layer).partition(1)[0]) as active:
        for update in range(2):
            active[0].tensor.grad = torch.ones(2560)
            optimizer.update(active, Schedule(1).visit(update), 1e-3)
    assert len(optimizer.chunks[0].host) == 10
    assert max(counted) == 1  # beside the block that is on its way
    assert len(counted) == 2 * 2 * 10
