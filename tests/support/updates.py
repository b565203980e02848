"""Fixed gradients fed to a layer through the optimizer."""

import torch
from torch import nn

from chunkplan.engine import ParameterStream, activate
from chunkplan.engine.optimizer.chunk_optimizer import ChunkOptimizer
from chunkplan.engine.stream.schedule import Schedule, Visit


def gradients(num_updates, shape=(6, 8), seed=0):
    """Random gradients of one weight."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(num_updates)]


def random_weight(shape=(6, 8), seed=1):
    """A random weight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(config, weight, updates, num_chunks=1, switch_every=1, lr=1e-2, lane=None, never_leaves=False):
    """Feed gradients to a layer of one weight through the optimizer; returns the weight and the optimizer.

    ``never_leaves``: one optimizer per chunk, whose visits never end.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    stream = ParameterStream(layer)
    chunks, schedule = stream.partition(num_chunks), Schedule(num_chunks, switch_every=switch_every)
    optimizer = ChunkOptimizer(config, lane)
    for update, gradient in enumerate(updates):
        visit = schedule.visit(update)
        if never_leaves:
            visit = Visit(update, visit.cycle, visit.chunk_index, is_first=False, is_last=False)
        with activate(layer, chunks[visit.chunk_index], stream) as active:
            for piece in active:
                piece.tensor.grad = gradient.flatten()[piece.start : piece.stop].to(weight.dtype)
            optimizer.update(active, visit, lr)
    return layer.weight.detach(), optimizer
