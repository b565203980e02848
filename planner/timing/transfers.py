"""Seconds of copies between host and device, and of updates beside which states come and go. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from chunkplan.planner.spec import GpuSpec


def transfer_seconds(num_bytes: int, gpu: GpuSpec) -> float:
    """Seconds to copy between host and device in one direction (CPU: from one place in memory to another)."""
    return num_bytes / gpu.link_bandwidth


@dataclass(frozen=True, slots=True)
class TransferTime:
    """Seconds of an update block by block, while states come and go beside it."""

    steady: float
    """While blocks follow one another."""
    edges: float
    """More, where no block is before the first one and none after the last: nothing hides their copies there.
    """


def update_beside_copies(
    update: float, bring: float, send: float, num_blocks: int, *, takes_turns: bool
) -> TransferTime:
    """The time of updates beside copies, as :mod:`chunkplan.engine.optimizer.state_transfer` makes them.

    A block's states come while the block before it is updated, and leave while the block after it is. Where
    they take turns in two buffers, a block's states cannot come before those of the last but one have left:
    two blocks then take at least as long as one block's way through.

    Args:
        update: seconds of all blocks' updates.
        bring: seconds of all copies to the device.
        send: seconds of all copies to the host.
        num_blocks: how many blocks there are, at least 1.
        takes_turns: states both come and leave, through two buffers.
    """
    in_turn = (update + bring + send) / 2 if takes_turns else 0.0
    steady = max(update, bring, send, in_turn)
    return TransferTime(steady, (update + bring + send - steady) / num_blocks)
