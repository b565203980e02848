"""Runs the engine's own step on tensors without storage, and records what is allocated and freed. Imports torch.

Only distinct blocks are traced: of a run of equal layers three are kept, and :mod:`planner.compose` repeats the middle one. Storages are watched, not
tensors (views are free), and a storage's end is seen by a weak reference.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from engine.chunks import Chunk
from engine.gradients import Activation, ActiveSlice, CutParameter
from engine.models import decoder_layers, meta_model
from engine.optimizer import BLOCK_NUMEL, AdamWConfig, BlockKey, ChunkAdamW, ChunkStates, Moments
from engine.spec import CheckpointedLayers, TrainingSpec
from engine.step import StepOptions, forward_backward, prepared
from engine.stream import ParameterStream
from planner.kernels import kernel_scratch_bytes, traced_attention
from planner.segments import CATEGORIES, EMBED, HEAD, Block, Segment, StepTrace, layer_runs
from planner.structure import ChunkRoles, ModelStructure

_GRADIENTS, _STATES = CATEGORIES.index("gradients"), CATEGORIES.index("optimizer_states")
_ACTIVATIONS, _LOSS = CATEGORIES.index("activations"), CATEGORIES.index("loss")
_WORKSPACE, _OTHER = CATEGORIES.index("workspace"), CATEGORIES.index("other")


class MemoryTrace(TorchDispatchMode):
    """Records allocations, frees and work of everything that runs inside it, under the current segment."""

    def __init__(self, device_kind: str) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.categories: list[int] = []
        self.segments: list[tuple[str, int, list[int], Counter[tuple[int, int]]]] = []
        self.category = _ACTIVATIONS
        self._device_kind = device_kind
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._events: list[int] = []
        self._work: Counter[tuple[int, int]] = Counter()

    def enter_segment(self, phase: str, place: int) -> None:
        """Everything from now on belongs to this place in this phase."""
        if self.segments and self.segments[-1][:2] == (phase, place):
            return
        self._events, self._work = [], Counter()
        self.segments.append((phase, place, self._events, self._work))

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the tensor's storage: it was there before the step."""
        storage = tensor.untyped_storage()
        self._live[storage._cdata] = (-1, weakref.ref(storage, self._forget(storage._cdata)))

    def block_of(self, tensor: Tensor) -> int:
        """The block that holds the tensor, or −1."""
        entry = self._live.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else -1

    def finished_segments(self) -> tuple[Segment, ...]:
        """What was recorded, as data."""
        return tuple(
            Segment(phase, place, tuple(events), tuple((*key, count) for key, count in work.items()))
            for phase, place, events, work in self.segments
        )

    def _forget(self, key: int) -> Callable[[Any], None]:
        def callback(_: Any) -> None:
            block, _reference = self._live.pop(key)
            if block >= 0:
                self._events.append(-1 - block)

        return callback

    def _allocate(self, size_bytes: int, category: int) -> int:
        self.sizes.append(size_bytes)
        self.categories.append(category)
        self._events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = out if isinstance(out, tuple | list) else (out,)
        is_new = False
        for tensor in outputs:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                is_new = True
                size_bytes = storage.nbytes()
                block = self._allocate(size_bytes, self.category) if size_bytes else -1
                self._live[key] = (block, weakref.ref(storage, self._forget(key)))
        scratch = kernel_scratch_bytes(func, args, self._device_kind)
        if scratch:
            self._events.append(-1 - self._allocate(scratch, _WORKSPACE))
        if is_new or func._schema.is_mutable:
            self._count_work(func, args, kwargs, out)
        return out

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        counter = flop_registry.get(func.overloadpacket)
        flops = int(counter(*args, **kwargs, out_val=out)) if counter else 0
        moved = sum(_tensor_bytes(value) for value in (*args, *kwargs.values(), out))
        self._work[flops, moved] += 1


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(_tensor_bytes(item) for item in value)
    return 0


class ModelTracer:
    """Traces steps of one architecture under one training spec.

    Args:
        config: content of a Hugging Face config.json.
        training: the spec; its schedule does not matter here.
        device_kind: ``cuda``, ``rocm`` or ``cpu``: decides which attention kernel runs.
    """

    def __init__(self, config: dict[str, Any], training: TrainingSpec, device_kind: str) -> None:
        self.training = training
        self.device_kind = device_kind
        self.model = meta_model(config, training.precision, training.attention)
        self.stream = ParameterStream(self.model)
        self.layers = decoder_layers(self.model)
        self._layer_types = getattr(self.model.config.get_text_config(), "layer_types", None)

    def structure(self) -> ModelStructure:
        """The model's stream and layers."""
        layer_of_id = {id(p): i for i, layer in enumerate(self.layers) for p in layer.parameters()}
        layer_of = tuple(layer_of_id.get(id(p), -1) for p in self.stream.parameters)
        inputs = self.model.get_input_embeddings()
        before = {id(p) for p in inputs.parameters()} if isinstance(inputs, nn.Module) else set()
        first_layer = next((i for i, layer in enumerate(layer_of) if layer >= 0), len(layer_of))
        buffers = {b.untyped_storage()._cdata: b.untyped_storage().nbytes() for b in self.model.buffers()}
        return ModelStructure(
            tuple(self.stream.infos),
            layer_of,
            tuple(self._signature(i) for i in range(len(self.layers))),
            sum(buffers.values()),
            tuple(
                layer < 0 and (id(p) in before or i < first_layer)
                for i, (p, layer) in enumerate(zip(self.stream.parameters, layer_of, strict=True))
            ),
        )

    def _signature(self, index: int) -> str:
        layer = self.layers[index]
        kind = self._layer_types[index] if self._layer_types else ""
        modules = [(name, type(module).__name__) for name, module in layer.named_modules()]
        shapes = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        return hashlib.sha256(repr((kind, modules, shapes)).encode()).hexdigest()[:16]

    def trace(self, chunk: Chunk, roles: ChunkRoles) -> StepTrace:
        """One micro-batch, forward and backward, with ``chunk`` active, on the distinct layers of ``roles`` only."""
        kept = [index for run in layer_runs(roles.layers) for index in run.traced]
        return self.trace_layers(chunk, kept)

    def trace_layers(self, chunk: Chunk, kept: list[int]) -> StepTrace:
        """The same on the given layers; with all of them nothing is left to compose."""
        training = self.training
        mode = MemoryTrace(self.device_kind)
        with ExitStack() as stack:
            stack.enter_context(self._reduced(kept))
            stack.enter_context(traced_attention(self.device_kind))
            stack.enter_context(self._segment_hooks(mode, kept))
            stack.enter_context(prepared(self.model, self._options(kept)))
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                mode.ignore(tensor)
            active = stack.enter_context(Activation(self.stream, chunk))
            if training.gradient_accumulation_steps > 1:
                # Later micro-batches find the gradients of the first one: they decide the peak.
                for piece in active:
                    _seed_gradient(piece)
                    mode.ignore(piece.tensor.grad)  # type: ignore[arg-type]
            with mode:
                mode.enter_segment("forward", EMBED)
                mode.category = _OTHER
                shape = (training.micro_batch_size, training.seq_len)
                input_ids = torch.empty(shape, dtype=torch.int64, device="meta")
                labels = torch.empty(shape, dtype=torch.int64, device="meta")
                mode.category = _ACTIVATIONS
                loss = forward_backward(self.model, input_ids, labels, 1.0, self._options(kept), _Phases(mode))
                del loss
                gradients = {mode.block_of(piece.tensor.grad): i for i, piece in enumerate(active) if piece.tensor.grad is not None}
                mode.enter_segment("end", EMBED)
            trace = self._finish(mode, gradients, active)
            for piece in active:
                piece.release_gradient()
        return trace

    def _options(self, kept: list[int]) -> StepOptions:
        choice = self.training.activation_checkpointing
        if isinstance(choice, CheckpointedLayers):
            choice = CheckpointedLayers(layers=[i for i, index in enumerate(kept) if index in choice.layers])
        return StepOptions(self.training.loss, choice)

    def _finish(
        self, mode: MemoryTrace, gradients: dict[int, int], active: list[ActiveSlice]
    ) -> StepTrace:
        blocks = []
        for index, (size_bytes, category) in enumerate(zip(mode.sizes, mode.categories, strict=True)):
            if index in gradients:
                blocks.append(Block(size_bytes, _GRADIENTS, gradients[index]))
            else:
                blocks.append(Block(size_bytes, category))
        numels = tuple(piece.tensor.numel() for piece in active)
        return StepTrace(tuple(blocks), mode.finished_segments(), numels)

    @contextmanager
    def _reduced(self, kept: list[int]) -> Iterator[None]:
        """The model with only the kept layers in its layer list."""
        owner, name = _owner_of_layers(self.model, self.layers)
        config = self.model.config.get_text_config()
        setattr(owner, name, nn.ModuleList([self.layers[index] for index in kept]))
        if self._layer_types:
            config.layer_types = [self._layer_types[index] for index in kept]
        try:
            yield
        finally:
            setattr(owner, name, nn.ModuleList(self.layers))
            if self._layer_types:
                config.layer_types = self._layer_types

    @contextmanager
    def _segment_hooks(self, mode: MemoryTrace, kept: list[int]) -> Iterator[None]:
        """Tell the trace where it is: module hooks in forward, tensor hooks in backward. Recomputation fires neither."""
        handles = []
        for position, index in enumerate(kept):
            is_last = position == len(kept) - 1
            handles.append(self.layers[index].register_forward_pre_hook(_before_layer(mode, position), with_kwargs=True))
            handles.append(self.layers[index].register_forward_hook(_after_layer(mode, position, is_last)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _seed_gradient(piece: ActiveSlice) -> None:
    """Give the slice a gradient, as a first micro-batch would have."""
    if isinstance(piece.parameter, CutParameter):
        piece.tensor.grad = torch.empty_like(piece.tensor, requires_grad=False)
    else:
        piece.parameter.grad = torch.empty_like(piece.parameter, requires_grad=False)
        piece.tensor.grad = piece.parameter.grad.view(-1)


class _Phases:
    """Observer that opens the first segment of each phase."""

    def __init__(self, mode: MemoryTrace) -> None:
        self._mode = mode

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        mode = self._mode
        if name == "backward":
            mode.category = _ACTIVATIONS
            mode.enter_segment("backward", HEAD)
        yield


def _first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else next(item for item in value if isinstance(item, Tensor))


def _before_layer(mode: MemoryTrace, position: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mode.enter_segment("forward", position)
        hidden = args[0] if args else kwargs["hidden_states"]
        if position == 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: mode.enter_segment("backward", EMBED))

    return hook


def _after_layer(mode: MemoryTrace, position: int, is_last: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = _first_tensor(output)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: mode.enter_segment("backward", position))
        if is_last:
            mode.enter_segment("forward", HEAD)
            mode.category = _LOSS

    return hook


def _owner_of_layers(model: nn.Module, layers: list[nn.Module]) -> tuple[nn.Module, str]:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == len(layers) and child[0] is layers[0]:
                return module, name
    raise LookupError("the model's layer list has no owner")


def trace_update(numel: int, itemsize: int, policy: Literal["keep", "reset"], comes: bool, leaves: bool) -> StepTrace:
    """The engine's update of one slice: block 0 is its gradient, allocated in a segment of its own; then the phase ``optimizer``.

    Args:
        numel, itemsize: elements of the slice and bytes per element of its weights.
        policy: for the states.
        comes: the states come to the device with this update.
        leaves: they leave with it.
    """
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    leaf = torch.empty(numel, dtype=dtype, device="meta", requires_grad=True)
    piece = ActiveSlice("slice", 0, numel, leaf, nn.Parameter(torch.empty(0, device="meta")))
    optimizer = ChunkAdamW(AdamWConfig(states=policy))
    states = ChunkStates(1)
    blocks = {(0, begin): min(BLOCK_NUMEL, numel - begin) for begin in range(0, numel, BLOCK_NUMEL)}
    if policy == "keep":
        states.host = {key: _moments(size) for key, size in blocks.items()}
    if not comes:
        states.device = {key: _moments(size) for key, size in blocks.items()}
    there = [*states.host.values(), *states.device.values()]
    mode = MemoryTrace("cpu")
    for tensor in (leaf, *(t for moments in there for t in (moments.exp_avg, moments.exp_avg_sq))):
        mode.ignore(tensor)
    states.device = _Watched(mode, states.device)
    mode.category = _WORKSPACE
    with mode:
        mode.enter_segment("gradient", EMBED)
        leaf.grad = torch.empty_like(leaf, requires_grad=False)
        mode.enter_segment("optimizer", EMBED)
        optimizer.update_slice(states, 0, piece, leaves, 1e-3)
        mode.enter_segment("end", EMBED)
    categories = {0: _GRADIENTS} | dict.fromkeys(states.device.blocks, _STATES)
    found = tuple(Block(size, categories.get(i, _WORKSPACE)) for i, size in enumerate(mode.sizes))
    return StepTrace(found, mode.finished_segments(), (numel,))


def _moments(numel: int) -> Moments:
    return Moments(*(torch.empty(numel, dtype=torch.float32, device="meta") for _ in range(2)))


class _Watched(dict[BlockKey, Moments]):
    """The optimizer's states on the device; remembers which blocks of the trace they were."""

    def __init__(self, mode: MemoryTrace, content: dict[BlockKey, Moments]) -> None:
        super().__init__(content)
        self._mode = mode
        self.blocks: set[int] = set()

    def __setitem__(self, key: BlockKey, moments: Moments) -> None:
        self.blocks |= {self._mode.block_of(moments.exp_avg), self._mode.block_of(moments.exp_avg_sq)}
        super().__setitem__(key, moments)
