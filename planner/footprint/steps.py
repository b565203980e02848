"""Forward and backward of a chunk's micro-batch, folded, and their seconds. Pure but for the trace store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from chunkplan.engine.spec import TrainingSpec
from chunkplan.engine.stream.chunks import Chunk, Slice
from chunkplan.planner.footprint.by_category import ByCategory
from chunkplan.planner.footprint.folded import FoldedSegment, FoldedStep, fold, segment_moments
from chunkplan.planner.timing.roofline import Rates
from chunkplan.planner.trace.layers import Copies, LayerRun, layer_runs
from chunkplan.planner.trace.roles import chunk_roles, stand_ins
from chunkplan.planner.trace.step_trace import EMBED, HEAD, StepTrace
from chunkplan.planner.trace.store import TraceStore
from chunkplan.planner.trace.structure import ModelStructure


@dataclass(frozen=True, slots=True)
class Step:
    """Forward and backward of one micro-batch of a chunk."""

    trace: StepTrace
    runs: tuple[LayerRun, ...]
    copies: Copies
    stood_for: list[tuple[int, ...]]
    """For each traced slice, the ordinals of the chunk's slices that it stands for."""
    traced: tuple[Slice, ...]
    """The first of those."""
    folded: FoldedStep
    sizes: list[int]
    """Sizes of the variables, in bytes."""
    phase_peaks: dict[str, int]
    """Relative to the beginning of the step."""
    net: int
    seconds: tuple[float, ...]
    """Seconds of every segment with its copies."""
    total_seconds: float

    @property
    def traced_numels(self) -> list[int]:
        """Elements of the slices that the traced ones stand for."""
        return [piece.numel for piece in self.traced]


class Steps:
    """Computes the steps of one model under one training spec on one device; each of them once.

    Args:
        store: traces of the model under the spec.
        training: the spec; its schedule is not read.
        structure: the model's.
        granularity: every block is rounded up to a multiple of this many bytes.
        rates: what the device achieves.
    """

    def __init__(
        self, store: TraceStore, training: TrainingSpec, structure: ModelStructure, granularity: int, rates: Rates
    ) -> None:
        self._store, self._training, self._structure = store, training, structure
        self._granularity, self._rates = granularity, rates
        self._steps: dict[tuple[int, int, int, int, bool], Step] = {}
        self._folded: dict[StepTrace, FoldedStep] = {}
        self._seconds: dict[StepTrace, list[float]] = {}

    def of_chunk(self, chunk: Chunk, *, expands: bool) -> Step:
        """The step while ``chunk`` is active; ``expands``: it computes the factored updates of the others."""
        first, last = chunk.slices[0], chunk.slices[-1]
        key = (first.index, first.start, last.index, last.stop, expands)
        if key not in self._steps:
            self._steps[key] = self._step(chunk, expands=expands)
        return self._steps[key]

    def _step(self, chunk: Chunk, *, expands: bool) -> Step:
        roles = chunk_roles(self._structure, chunk, self._training)
        runs = tuple(layer_runs(roles.layers))
        trace = self._store.step(chunk, roles, expands=expands)
        folded, copies = self.folded(trace), Copies.of(runs)
        stood_for = stand_ins(self._structure, chunk, runs)
        traced = tuple(chunk.slices[ordinals[0]] for ordinals in stood_for)
        itemsize = self._training.trained_precision.itemsize
        sizes = folded.sizes(copies, [piece.numel for piece in traced], itemsize)
        phase_peaks, net = phase_peaks_and_net(folded, segment_moments(folded.totals, copies, sizes, 0))
        seconds = self._segment_seconds(trace, copies)
        total = _one_after_another(seconds)
        return Step(trace, runs, copies, stood_for, traced, folded, sizes, phase_peaks, net, seconds, total)

    def folded(self, trace: StepTrace) -> FoldedStep:
        """A trace of this model, folded."""
        if trace not in self._folded:
            self._folded[trace] = fold(trace, self._granularity)
        return self._folded[trace]

    def _segment_seconds(self, trace: StepTrace, copies: Copies) -> tuple[float, ...]:
        """Seconds of every segment with its copies."""
        if trace not in self._seconds:
            self._seconds[trace] = [self._rates.seconds(segment.work) for segment in trace.segments]
        return tuple(
            seconds * copies.num_of(segment.place)
            for seconds, segment in zip(self._seconds[trace], trace.segments, strict=True)
        )

    @cached_property
    def evaluation_bytes(self) -> int:
        """Highest moment of a held-out batch's forward pass, on top of what is live between two updates."""
        folded = self.folded(self._store.evaluation())
        copies = Copies.of(layer_runs(self._structure.signatures))
        moments = segment_moments(folded.totals, copies, folded.sizes(copies, (), 0), 0)
        peaks, _ = phase_peaks_and_net(folded, moments)
        return max(peaks.values())


def phase_peaks_and_net(folded: FoldedStep, moments: Iterable[tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Highest moment of each phase relative to the beginning of the step, and the step's change.

    ``loss`` is the end of ``forward``: final norm, head and loss.

    Args:
        folded: the step.
        moments: (highest moment, change) of its segments.
    """
    live, peaks = 0, dict[str, int]()
    for segment, (highest, net) in zip(folded.totals, moments, strict=True):
        if segment.phase != "end":
            peaks[segment.phase] = max(peaks.get(segment.phase, 0), live + highest)
        if segment.phase == "forward" and segment.place == HEAD:
            peaks["loss"] = max(peaks.get("loss", 0), live + highest)
        live += net
    return peaks, live


def _one_after_another(seconds: Iterable[float]) -> float:
    """A sum that rounds as a clock that is moved on does; :func:`sum` may round less."""
    total = 0.0
    for each in seconds:
        total += each
    return total


def place_name(place: int) -> str:
    """``embedding``, ``head`` or ``layer 3``."""
    return {EMBED: "embedding", HEAD: "head"}.get(place, f"layer {place}")


def segment_name(segment: FoldedSegment[ByCategory], copies: Copies) -> str:
    """The real place of a segment, or ``layers 3-9`` in the order of time."""
    if segment.place < 0:
        return place_name(segment.place)
    real = copies.real(segment.place)
    first, last = (real[0], real[-1]) if segment.phase == "forward" else (real[-1], real[0])
    return place_name(first) if first == last else f"layers {first}-{last}"
