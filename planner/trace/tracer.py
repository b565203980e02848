"""Runs the engine's own step on tensors without storage, and records what is allocated and freed. Imports
torch.

Only distinct blocks are traced: of equal layers three are kept, and
:mod:`chunkplan.planner.footprint.compose` repeats the middle one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chunkplan.engine.errors import InputError
from chunkplan.engine.gradients.activation import Activation, ActiveSlice
from chunkplan.engine.gradients.cut_parameter import CutParameter
from chunkplan.engine.gradients.fused_loss import block_rows
from chunkplan.engine.model.adapters import add_adapters
from chunkplan.engine.model.loading import meta_model
from chunkplan.engine.model.packed_rows import check_packable, would_meet
from chunkplan.engine.model.parts import decoder_layers, layer_lists
from chunkplan.engine.model.tasks import Task, task_of
from chunkplan.engine.optimizer.expansion import Expansion
from chunkplan.engine.spec import CheckpointedLayers, StepSpec, TrainingSpec
from chunkplan.engine.stream.chunks import Chunk
from chunkplan.engine.stream.parameters import ParameterStream
from chunkplan.engine.torch_internals import storage_key
from chunkplan.engine.training.step import compute_loss, forward_backward, prepared
from chunkplan.planner.trace.autocast import traced_autocast
from chunkplan.planner.trace.kernels import traced_kernels
from chunkplan.planner.trace.layers import layer_runs
from chunkplan.planner.trace.recorder import Known, MemoryTrace
from chunkplan.planner.trace.roles import ChunkRoles
from chunkplan.planner.trace.step_trace import CATEGORIES, EMBED, HEAD, Block, StepTrace
from chunkplan.planner.trace.structure import ModelStructure

_GRADIENTS = CATEGORIES.index("gradients")
_ACTIVATIONS, _LOSS = CATEGORIES.index("activations"), CATEGORIES.index("loss")
_OTHER = CATEGORIES.index("other")

MAX_SCANNED_TOKENS = 128


class ModelTracer:
    """Traces steps of one architecture under one training spec.

    Args:
        config: content of a Hugging Face config.json.
        training: the spec; its schedule does not matter here.
        device_kind: ``cuda``, ``rocm`` or ``cpu``: decides which attention kernel runs.
        known: see :class:`chunkplan.planner.trace.recorder.MemoryTrace`.
    """

    def __init__(
        self, config: dict[str, Any], training: TrainingSpec, device_kind: str, known: Known | None = None
    ) -> None:
        self.training = training
        self.device_kind = device_kind
        self._known: Known = {} if known is None else known
        with _refusals("building the model"):
            self.model = meta_model(config, training.precision, training.attention)
            if training.lora is not None:
                add_adapters(self.model, training.lora)
        self.stream = ParameterStream(self.model, only_trainable=training.lora is not None)
        self.layers = decoder_layers(self.model)
        self._is_composed = len(layer_lists(self.model)) == 1
        if not self.layers or not any(True for _ in self.layers[0].parameters()):
            raise InputError("model.config", f"{type(self.model).__name__} has no list of layers to plan by")
        _check_positions(self.model, training.seq_len)
        _check_scan(self.model, training.seq_len)
        with prepared(self.model, training):
            pass  # refuses layers that the model does not have
        if training.packing:
            check_packable(self.model)
        self.task = task_of(self.model)
        self._layer_types = getattr(self.model.config.get_text_config(), "layer_types", None)

    def structure(self) -> ModelStructure:
        """The model's stream and layers."""
        layer_of_id = {id(p): i for i, layer in enumerate(self.layers) for p in layer.parameters()}
        layer_of = tuple(layer_of_id.get(id(p), -1) for p in self.stream.parameters)
        inputs = self.model.get_input_embeddings()
        before = {id(p) for p in inputs.parameters()} if isinstance(inputs, nn.Module) else set()
        first_layer = next((i for i, layer in enumerate(layer_of) if layer >= 0), len(layer_of))
        head, loss_rows = self._head()
        buffers = {storage_key(b.untyped_storage()): b.untyped_storage().nbytes() for b in self.model.buffers()}
        stream = {id(p) for p in self.stream.parameters}
        return ModelStructure(
            tuple(self.stream.infos),
            tuple((p.numel(), p.nbytes) for p in self.model.parameters() if id(p) not in stream),
            layer_of,
            tuple(self._signature(i) for i in range(len(self.layers))),
            sum(buffers.values()),
            tuple(
                layer < 0 and (id(p) in before or i < first_layer)
                for i, (p, layer) in enumerate(zip(self.stream.parameters, layer_of, strict=True))
            ),
            head,
            loss_rows,
            2 + self.training.packing + {Task.CAUSAL: 0, Task.MASKED: 1, Task.SEQ2SEQ: 2}[self.task],
        )

    def _head(self) -> tuple[int, int]:
        """Place of the output projection in the stream; how many of its rows the fused loss treats at once
        (0: all).
        """
        outputs = self.model.get_output_embeddings()
        weight = getattr(outputs, "weight", None)
        index = next((i for i, p in enumerate(self.stream.parameters) if p is weight), -1)
        if weight is None or self.training.loss != "fused":
            return index, 0
        return index, block_rows(weight.shape[0], self.training.micro_batch_size * self.training.seq_len)

    def _signature(self, index: int) -> str:
        layer = self.layers[index]
        kind = self._layer_types[index] if self._layer_types and self._is_composed else ""
        modules = [(name, type(module).__name__, _switches(module)) for name, module in layer.named_modules()]
        shapes = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        place = 0 if self._is_composed else index  # an encoder's layers and a decoder's: no two are traced as one
        return hashlib.sha256(repr((kind, modules, shapes, place)).encode()).hexdigest()[:16]

    def trace(self, chunk: Chunk, roles: ChunkRoles, *, expands: bool = False) -> StepTrace:
        """One micro-batch, forward and backward, with ``chunk`` active, on the distinct layers of ``roles``
        only.

        Args:
            chunk: the active one.
            roles: of the layers while it is active.
            expands: the parameters above it take part (``expansion: factored``).
        """
        kept = [index for run in layer_runs(roles.layers) for index in run.traced]
        return self.trace_layers(chunk, kept, expands=expands)

    def trace_evaluation(self) -> StepTrace:
        """The loss of a held-out batch, as :func:`chunkplan.engine.training.step.evaluate` computes it, on
        the distinct layers only.
        """
        kept = [index for run in layer_runs(self.structure().signatures) for index in run.traced]
        mode = MemoryTrace(self.device_kind, self._known)
        with ExitStack() as stack:
            self._enter(stack, mode, kept)
            self.model.eval()
            stack.callback(self.model.train)
            stack.enter_context(torch.no_grad())
            with mode:
                with _refusals(f"an evaluation of {type(self.model).__name__}"):
                    compute_loss(self.model, self._batch(mode), 1.0, self._options(kept))
                mode.enter_segment("end", EMBED)
        return self._finish(mode, {}, [])

    def _enter(self, stack: ExitStack, mode: MemoryTrace, kept: list[int]) -> list[torch.Size]:
        """What makes a forward pass one of the device's, watched; see :func:`traced_kernels` for what it
        returns.
        """
        stack.enter_context(self._reduced(kept))
        asked = stack.enter_context(traced_kernels(self.device_kind, packing=self.training.packing))
        if self.training.autocast != "none":
            stack.enter_context(traced_autocast(self.device_kind, self.layers))
        stack.enter_context(self._segment_hooks(mode, kept))
        stack.enter_context(prepared(self.model, self._options(kept)))
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            mode.ignore(tensor)
        return asked

    def _batch(self, mode: MemoryTrace) -> dict[str, Tensor]:
        """A micro-batch, in the first segment of a forward pass."""
        mode.enter_segment("forward", EMBED)
        mode.category = _OTHER
        names = ["input_ids", "labels"]
        if self.task is not Task.CAUSAL:  # with padding in it: the mask takes memory
            names.append("attention_mask")
        if self.task is Task.SEQ2SEQ:
            names.append("decoder_input_ids")
        if self.training.packing:
            names.append("position_ids")
        shape = (self.training.micro_batch_size, self.training.seq_len)
        batch = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name in names}
        mode.category = _ACTIVATIONS
        return batch

    def trace_layers(self, chunk: Chunk, kept: list[int], *, expands: bool = False) -> StepTrace:
        """Trace a step on the given layers; with all of them nothing is left to compose."""
        training = self.training
        mode = MemoryTrace(self.device_kind, self._known)
        with ExitStack() as stack:
            asked = self._enter(stack, mode, kept)
            expansion = self._expansion(mode) if expands else None
            on_gradient = _release if training.update_in_backward else None
            active = stack.enter_context(Activation(self.stream, chunk, expansion, on_gradient))
            if training.gradient_accumulation_steps > 1:
                # Later micro-batches find the gradients of the first one: they decide the peak.
                for piece in active:
                    piece.tensor.grad = torch.empty_like(piece.tensor, requires_grad=False)
                    mode.ignore(piece.tensor.grad)
            taking_part = self._taking_part(active, kept)
            gradients = stack.enter_context(_watched_gradients(mode, taking_part))
            with mode:
                batch = self._batch(mode)
                with _refusals(f"a training step of {type(self.model).__name__}"):
                    forward_backward(self.model, batch, 1.0, self._options(kept), _Phases(mode))
                if training.packing and not asked:
                    raise would_meet(self.model)
                mode.enter_segment("end", EMBED)
            trace = self._finish(mode, gradients, taking_part)
            for piece in active:
                piece.release_gradient()
        return trace

    def _taking_part(self, active: list[ActiveSlice], kept: list[int]) -> list[ActiveSlice]:
        """The active slices outside the layers and in the kept ones: see
        :func:`chunkplan.planner.trace.roles.stand_ins`.
        """
        left_out = set(range(len(self.layers))) - set(kept) if self._is_composed else set()
        absent = {id(parameter) for index in left_out for parameter in self.layers[index].parameters()}
        return [piece for piece in active if id(piece.parameter) not in absent]

    def _expansion(self, mode: MemoryTrace) -> Expansion:
        expansion = Expansion(zip(self.stream.names, self.stream.parameters, strict=True))
        for moments in expansion.moments.values():
            mode.ignore(moments.row)
            mode.ignore(moments.column)
        return expansion

    def _options(self, kept: list[int]) -> StepSpec:
        choice = self.training.activation_checkpointing
        if isinstance(choice, CheckpointedLayers):
            choice = CheckpointedLayers(layers=[i for i, index in enumerate(kept) if index in choice.layers])
        return self.training.model_copy(update={"activation_checkpointing": choice})

    def _finish(self, mode: MemoryTrace, gradients: dict[int, int], active: list[ActiveSlice]) -> StepTrace:
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
        """The model with only the kept layers in its layer list; with several lists, all layers are kept."""
        if not self._is_composed:
            yield
            return
        owner, name = _owner_of_layers(self.model, self.layers)
        config = self.model.config.get_text_config()
        setattr(owner, name, nn.ModuleList([self.layers[index] for index in kept]))
        is_stored = "layer_types" in vars(config)  # some families derive it
        if self._layer_types and is_stored:
            config.layer_types = [self._layer_types[index] for index in kept]
        try:
            yield
        finally:
            setattr(owner, name, nn.ModuleList(self.layers))
            if self._layer_types and is_stored:
                config.layer_types = self._layer_types

    @contextmanager
    def _segment_hooks(self, mode: MemoryTrace, kept: list[int]) -> Iterator[None]:
        """Tell the trace where it is: module hooks in forward, tensor hooks in backward. Recomputing fires
        neither.
        """
        handles = []
        for position, index in enumerate(kept):
            is_last = position == len(kept) - 1
            handles.append(
                self.layers[index].register_forward_pre_hook(_before_layer(mode, position), with_kwargs=True)
            )
            handles.append(self.layers[index].register_forward_hook(_after_layer(mode, position, is_last)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _switches(module: nn.Module) -> list[tuple[str, bool]]:
    """Flags that a family sets layer by layer: every fourth SmolLM3 attention has no rotary positions (0 or
    1).
    """
    flags = ((name, value) for name, value in vars(module).items() if isinstance(value, int) and value in (0, 1))
    return sorted((name, bool(value)) for name, value in flags if not re.search("idx|index|layer", name))


def _release(ordinal: int, piece: ActiveSlice) -> None:
    """Where the slice would be updated in backward: its gradient goes, and the planner puts the
    update there.
    """
    piece.release_gradient()


@contextmanager
def _watched_gradients(mode: MemoryTrace, active: list[ActiveSlice]) -> Iterator[dict[int, int]]:
    """Filled during backward: blocks in which gradients arrive (sized by the cuts), and their slices'
    ordinals.
    """
    blocks: dict[int, int] = {}

    def watch(leaf: Tensor, ordinal: int) -> Any:
        return leaf.register_hook(lambda gradient: blocks.update({mode.block_of(gradient): ordinal}))

    leaves = [piece.tensor if isinstance(piece.parameter, CutParameter) else piece.parameter for piece in active]
    handles = [watch(leaf, ordinal) for ordinal, leaf in enumerate(leaves)]
    try:
        yield blocks
    finally:
        for handle in handles:
            handle.remove()


def _check_positions(model: PreTrainedModel, seq_len: int) -> None:
    """Raises InputError for a sequence longer than a table of learned positions, which fails only where it is
    read.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or seq_len <= limit:
        return
    inputs = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not inputs)
    # Some families keep a few extra rows at the front (OPT: two).
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):
        raise InputError("training.seq_len", f"at most {limit}: this model has learned positions and no more of them")


def _check_scan(model: PreTrainedModel, seq_len: int) -> None:
    """Raises InputError for a recurrent model on long sequences: it goes token by token, and so would its
    trace.
    """
    if not hasattr(model.config.get_text_config(), "num_attention_heads") and seq_len > MAX_SCANNED_TOKENS:
        problem = f"a plan of {type(model).__name__}, which has no attention, would take minutes"
        raise InputError("training.seq_len", f"at most {MAX_SCANNED_TOKENS}: {problem}")


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn any failure of a library on a user's config into a refusal of that config."""
    try:
        yield
    except (InputError, MemoryError, RecursionError):
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        problem = f"{type(error).__name__}: {lines[0][:200]}"
        raise InputError("model.config", f"{what} fails: {problem}") from error


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
