"""Everything that engine and planner use of torch beyond its public interface, in one place.

torch promises nothing for these names. They were checked, with the whole test suite, on the versions in
:data:`CHECKED_VERSIONS`; a test fails where another one is installed. A name that moves is mended here only.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _disable_profiler as disable_profiler
from torch._C._autograd import _enable_profiler as enable_profiler
from torch._C._autograd import _prepare_profiler as prepare_profiler
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope
from torch._C._profiler import _EventType as ProfilerEventType
from torch._C._profiler import _ExperimentalConfig as ExperimentalConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_any, tree_map, tree_map_only

__all__ = [
    "CHECKED_VERSIONS",
    "DIFFERENTIABLE_GETTERS",
    "ExperimentalConfig",
    "ProfilerActivity",
    "ProfilerConfig",
    "ProfilerEventType",
    "ProfilerState",
    "RecordScope",
    "TorchDispatchMode",
    "disable_profiler",
    "enable_profiler",
    "fused_attention_choice",
    "grouped_product",
    "holders",
    "prepare_profiler",
    "storage_key",
    "torch_grouped_product",
    "tree_any",
    "tree_map",
    "tree_map_only",
    "without_modes",
    "without_subclasses",
]

CHECKED_VERSIONS = ("2.11", "2.12", "2.13")
"""Versions of torch on which the names of this module were tested."""

without_subclasses = torch._C.DisableTorchFunctionSubclass
"""Context in which tensors of a class of their own are plain ones."""
DIFFERENTIABLE_GETTERS = {vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT", "H", "mH")}
"""Getters of a tensor's attributes that autograd records."""
torch_grouped_product: Callable[..., Tensor] = torch._grouped_mm
"""Product of groups of rows with a matrix each, which mixtures of experts compute, as torch has it."""
fused_attention_choice: Callable[..., int] = torch._fused_sdp_choice
"""Number of the kernel (:class:`torch.nn.attention.SDPBackend`) that attention takes."""
storage_key: Callable[[Any], int] = attrgetter("_cdata")
"""Identity of a storage, for as long as it lives."""


def grouped_product(*arguments: Any, **named: Any) -> Tensor:
    """Return what :data:`torch_grouped_product` does, or whatever stands in its place while a
    step is traced.
    """
    result: Tensor = torch._grouped_mm(*arguments, **named)
    return result


def holders(tensor: Tensor) -> tuple[int, int]:
    """Return how many hold a tensor from C++, and how many its storage."""
    return tensor._use_count(), torch._C._storage_Use_Count(storage_key(tensor.untyped_storage()))  # type: ignore[attr-defined]
