"""What the allocator's record holds before a test measures."""

import torch


def held(profiler):
    """Bytes on record at this moment: the test's own so far, and what earlier tests of the process have left
    there."""
    with profiler.step(), profiler.phase("rest"):
        torch.empty(1)
    (sample,) = profiler.samples
    return sample.allocated_bytes
