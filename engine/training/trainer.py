"""One training attempt from its spec to its exported model, told top-down.

The trainer reports what happens as events (:mod:`chunkplan.engine.protocol`); it neither prints nor knows who
listens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from chunkplan.engine.arithmetic import ceil_div
from chunkplan.engine.data import Batches, DatasetSplits, Example, collate, load_dataset, with_validation
from chunkplan.engine.data.token_store import remove_store
from chunkplan.engine.export.model_card import ModelCard, base_license
from chunkplan.engine.export.model_folder import export_model
from chunkplan.engine.model.adapters import add_adapters, merge_adapters
from chunkplan.engine.model.loading import check_model_folder, load_model, load_tokenizer, pad_token_id
from chunkplan.engine.model.tasks import BatchPreparation, Task
from chunkplan.engine.optimizer.loss_scale import MAX_SKIPPED_IN_ROW
from chunkplan.engine.process.steady_heap import trim_heap
from chunkplan.engine.protocol import (
    ArtifactEvent,
    CheckpointEvent,
    CoverageEvent,
    EvalEvent,
    FinishedEvent,
    Report,
    StartedEvent,
    StepEvent,
    WarningEvent,
)
from chunkplan.engine.record.profiler import Sample, process_peak_bytes, profiler_for
from chunkplan.engine.spec import RunSpec
from chunkplan.engine.stream.schedule import expected_updates, few_updates_warning, learning_rate
from chunkplan.engine.training.checkpoint import resume, save_checkpoint
from chunkplan.engine.training.chunkft import ChunkFT
from chunkplan.engine.training.coverage import parameter_digests, updated_share
from chunkplan.engine.training.divergence import MARGIN, PATIENCE, LossWatch
from chunkplan.engine.training.fingerprint import fingerprint
from chunkplan.engine.training.step import evaluate, num_counted_tokens

_PIPELINE_TAGS = {
    Task.CAUSAL: "text-generation",
    Task.MASKED: "fill-mask",
    Task.SEQ2SEQ: "text2text-generation",
}
_NUM_LOSS_SPANS = 10
"""Rows of the training losses in the model card."""


class Diverged(RuntimeError):
    """The loss or its gradient is no longer a finite number, or the loss has exploded."""


@dataclass(slots=True)
class HeldOutLoss:
    """Held-out loss at a step."""

    step: int
    loss: float


class Trainer:
    """Runs one attempt of a job in ``run_dir``.

    Args:
        run: the resolved job.
        run_dir: holds ``checkpoints/`` and ``artifacts/``.
        report: takes the run's events.
        stop_requested: asked after every update; true means checkpoint and stop.
    """

    def __init__(self, run: RunSpec, run_dir: Path, report: Report, stop_requested: Callable[[], bool]) -> None:
        self.run = run
        self.training = run.training.resolved()
        self.schedule = self.training.schedule
        self.run_dir = run_dir
        self.report = report
        self.stop_requested = stop_requested
        self.evaluations: list[HeldOutLoss] = []
        self.loss_sums = [(0.0, 0)] * _NUM_LOSS_SPANS
        self.peak_allocated_bytes = 0
        self.first_step = 0
        self.training_seconds = 0.0

    def train(self) -> str:
        """Train to the end or to a requested stop; returns ``completed`` or ``stopped``.

        Raises:
            InputError: model or data cannot be used.
            Diverged: the loss or the gradient's norm is not finite, or the loss has exploded.
        """
        self._load()
        resumed_step = self._resume()
        self._report_started(resumed_step)
        self._evaluate_if_due()
        while self.tuner.num_updates < self.total_steps:
            self._update()
            step = self.tuner.num_updates
            stopping = self.stop_requested() and step < self.total_steps
            if not stopping:
                self._evaluate_if_due()
            if stopping or (step % self._checkpoint_every == 0 and step < self.total_steps):
                self._save()
            if stopping:
                self._report_finished(step, "stopped")
                return "stopped"
        self.tuner.close()
        self._evaluate(self.total_steps)
        self._report_coverage()
        self._export()
        remove_store(self._tokens_dir)
        self._report_finished(self.total_steps, "completed")
        return "completed"

    @property
    def _tokens_dir(self) -> Path:
        """The tokenized data; kept until the run is complete, so that resuming does not tokenize again."""
        return self.run_dir / "tokens"

    def _load(self) -> None:
        run, training = self.run, self.training
        torch.manual_seed(training.seed)
        check_model_folder(run.model_path)
        self.tokenizer = load_tokenizer(run.model_path)
        self.splits: DatasetSplits = load_dataset(
            Path(run.dataset_path),
            run.dataset_format,
            self.tokenizer,
            training.seq_len,
            run.eval_fraction,
            training.seed,
            packing=training.packing,
            folder=self._tokens_dir,
        )
        if run.validation_path is not None:
            self.splits = with_validation(
                self.splits,
                Path(run.validation_path),
                run.dataset_format,
                self.tokenizer,
                training.seq_len,
                training.seed,
                packing=training.packing,
                folder=self._tokens_dir / "validation",
            )
        self.batches = Batches(self.splits.train, training.micro_batch_size, training.seed)
        self.profiler = profiler_for(run.device)
        with self.profiler.step(), self.profiler.phase("load"):
            self.model = load_model(run.model_path, training.precision, training.attention, run.device)
            if training.lora is not None:
                add_adapters(self.model, training.lora)
        self.loss_watch = LossWatch(getattr(self.model.config.get_text_config(), "vocab_size", 2**20))
        self.load_samples = self.profiler.samples
        self.prepare_batch = BatchPreparation(self.model, self.tokenizer, training.seq_len, training.seed)
        trim_heap()
        self.base_digests = parameter_digests(self.model)
        with self.profiler.step():  # what the tuner keeps on the device belongs to the record
            self.tuner = ChunkFT.of(
                training,
                self.model,
                self._learning_rate,
                weight_decay=training.weight_decay,
                expansion_lr=self._expansion_learning_rate,
                seed=training.seed,
                observer=self.profiler,
            )
        self.total_steps = expected_updates(training, self.batches.num_batches_per_epoch)
        self._checkpoint_every = training.checkpoint_every or self.tuner.schedule.updates_per_cycle

    def _expansion_learning_rate(self, update: int) -> float:
        base = self.training.expansion_learning_rate or self.training.learning_rate / 3
        return self._learning_rate(update) / self.training.learning_rate * base

    def _learning_rate(self, update: int) -> float:
        return learning_rate(self.training, update, self.total_steps)

    def _fingerprint(self) -> str:
        return fingerprint(self.training, self.tuner.stream.infos, self.splits.stats.sha256)

    def _resume(self) -> int:
        resumed = resume(self.tuner, self.run_dir / "checkpoints", self._fingerprint())
        for sentence in resumed.passed_over:
            self.report(WarningEvent(detail=f"checkpoint passed over: {sentence}"))
        if resumed.step:
            notes = resumed.notes
            self.evaluations = [HeldOutLoss(*pair) for pair in notes["evaluations"]]
            self.peak_allocated_bytes = notes["peak_allocated_bytes"]
            self.loss_watch.restore(notes["loss_watch"])
            self.loss_sums = [(total, count) for total, count in notes["loss_sums"]]
        self.first_step = resumed.step
        return resumed.step

    def _update(self) -> None:
        """One optimizer update: its micro-batches, then the step."""
        tuner = self.tuner
        visit, rate = tuner.visit, self._learning_rate(tuner.num_updates)
        begin = time.perf_counter()
        with self.profiler.step():
            with self.profiler.phase("load"):
                micro_batches = self._micro_batches(tuner.num_updates)
                denominator = max(sum(num_counted_tokens(batch["labels"], tuner.task) for batch in micro_batches), 1)
            loss = 0.0
            for i, batch in enumerate(micro_batches, start=1):
                loss += float(tuner.backward(batch, denominator, is_last=i == len(micro_batches)))
            self._check_loss(loss)
            norm = tuner.step()
            self._check_skips()
            if norm is not None and not math.isfinite(norm):
                place = f"update {tuner.num_updates}, chunk {visit.chunk_index}"
                raise Diverged(f"gradient norm is {norm} at {place}; {self._advice()}")
            num_tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
            del micro_batches, batch  # freed within the window of the record
        trim_heap()
        seconds = time.perf_counter() - begin
        self.training_seconds += seconds
        samples, self.load_samples = [*self.load_samples, *self.profiler.samples], []
        self._report_step(visit.chunk_index, visit.cycle, loss, rate, norm, num_tokens, seconds, samples)

    def _check_loss(self, loss: float) -> None:
        update = self.tuner.num_updates + 1
        if not math.isfinite(loss):
            raise Diverged(f"loss is {loss} at update {update}, chunk {self.tuner.visit.chunk_index}; {self._advice()}")
        if self.loss_watch.add(loss):
            raise Diverged(
                f"loss is {loss:.2f} at update {update} and has been more than {MARGIN:g} above the beginning's "
                f"{self.loss_watch.beginning:.2f} for {PATIENCE} updates in a row; {self._advice()}"
            )
        span = (update - 1) * _NUM_LOSS_SPANS // self.total_steps
        total, count = self.loss_sums[span]
        self.loss_sums[span] = (total + loss, count + 1)

    def _advice(self) -> str:
        rate = self.training.learning_rate
        return f"lower training.learning_rate from {rate:g}, for example to {rate / 10:g}"

    def _check_skips(self) -> None:
        scale = self.tuner.loss_scale
        if scale is not None and scale.num_skipped_in_row >= MAX_SKIPPED_IN_ROW:
            raise Diverged(
                f"gradients overflowed in {scale.num_skipped_in_row} updates in a row, at a loss scale of "
                f"{scale.scale:g} still; use precision 'bf16' or 'fp32'"
            )

    def _micro_batches(self, update: int) -> list[dict[str, Tensor]]:
        count = self.training.gradient_accumulation_steps
        indices = range(update * count, (update + 1) * count)
        return [self._tensors(self.batches.batch(index), index) for index in indices]

    def _tensors(self, examples: list[Example], index: int) -> dict[str, Tensor]:
        training = self.training
        collated = collate(examples, pad_token_id(self.tokenizer), training.seq_len, packing=training.packing)
        batch = self.prepare_batch(collated, [len(example.input_ids) for example in examples], index)
        return {name: tensor.to(self.run.device) for name, tensor in batch.items()}

    def _evaluate_if_due(self) -> None:
        """Evaluate before training and every so often; on resume, what a stop had left out."""
        step, every = self.tuner.num_updates, self.training.eval_every
        is_done = bool(self.evaluations) and self.evaluations[-1].step == step
        if not is_done and step < self.total_steps and (step == 0 or (every and step % every == 0)):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        held_out = self.splits.evaluation
        if not held_out:
            return
        samples: list[Sample] = []
        loss, num_tokens = evaluate(self.model, self._held_out_batches(held_out, samples), self.tuner.options)
        trim_heap()
        if not math.isfinite(loss):
            raise Diverged(f"held-out loss is {loss} after update {step}; {self._advice()}")
        if step == 0:
            self.loss_watch.begin(loss, num_tokens)
        self.evaluations.append(HeldOutLoss(step, loss))
        perplexity = math.exp(min(loss, 700.0))
        self.report(
            EvalEvent(
                step=step,
                loss=loss,
                perplexity=perplexity,
                num_tokens=num_tokens,
                samples=[sample.reported() for sample in samples],
            )
        )

    def _held_out_batches(self, held_out: Sequence[Example], samples: list[Sample]) -> Iterator[dict[str, Tensor]]:
        """Yield batches, each within an open window of the record; leave the phase's sample."""
        size = self.training.micro_batch_size
        for i in range(0, len(held_out), size):
            with self.profiler.step(), self.profiler.phase("evaluation"):
                yield self._tensors(list(held_out[i : i + size]), -1 - i)
            (sample,) = self.profiler.samples
            samples[:] = [sample.merge(known) for known in samples] or [sample]

    def _save(self) -> None:
        notes = {
            "evaluations": [[evaluation.step, evaluation.loss] for evaluation in self.evaluations],
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "loss_watch": self.loss_watch.state(),
            "loss_sums": self.loss_sums,
        }
        keep = self.training.checkpoints_to_keep
        with self.profiler.step(), self.profiler.phase("checkpoint"):
            saved = save_checkpoint(self.tuner, self.run_dir / "checkpoints", self._fingerprint(), notes, keep)
        self.report(
            CheckpointEvent(
                step=saved.step,
                path=str(saved.path.relative_to(self.run_dir)),
                size_bytes=saved.size_bytes,
                sha256=saved.sha256,
                samples=[sample.reported() for sample in self.profiler.samples],
            )
        )

    def _report_started(self, resumed_step: int) -> None:
        self.report(
            StartedEvent(
                pid=os.getpid(),
                device=self.run.device,
                num_parameters=self._num_parameters(),
                num_trainable_parameters=self.tuner.stream.num_parameters,
                num_chunks=self.schedule.num_chunks,
                total_steps=self.total_steps,
                resumed_step=resumed_step,
                dataset=asdict(self.splits.stats),
            )
        )
        warning = few_updates_warning(self.schedule, self.total_steps)
        if warning is not None and resumed_step == 0:
            self.report(WarningEvent(detail=warning))

    def _num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _report_step(
        self, chunk_index: int, visit: int, loss: float, rate: float, norm: float | None, num_tokens: int,
        seconds: float, samples: list[Sample],
    ) -> None:  # fmt: skip
        step = self.tuner.num_updates
        self.peak_allocated_bytes = max([self.peak_allocated_bytes, *(s.allocated_bytes for s in samples)])
        self.report(
            StepEvent(
                step=step,
                total_steps=self.total_steps,
                chunk_index=chunk_index,
                visit=visit,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                skipped=self.tuner.was_skipped,
                num_tokens=num_tokens,
                seconds=seconds,
                eta_seconds=(self.total_steps - step) * self.training_seconds / (step - self.first_step),
                samples=[sample.reported() for sample in samples],
            )
        )

    def _report_coverage(self) -> None:
        num_updated, not_updated = updated_share(self.model, self.base_digests)
        num_tensors = len(self.base_digests)
        self.report(CoverageEvent(num_tensors=num_tensors, num_tensors_updated=num_updated, not_updated=not_updated))

    def _report_finished(self, step: int, reason: Literal["completed", "stopped"]) -> None:
        self.report(FinishedEvent(step=step, reason=reason, process_peak_bytes=process_peak_bytes()))

    def _export(self) -> None:
        folder = self.run_dir / "artifacts" / self.run.output_name
        card, adapter_base = self._card(), None
        if self.training.lora is not None and self.run.merge:
            merge_adapters(self.model)
        elif self.training.lora is not None:
            adapter_base = card.base_model
        for file in export_model(self.model, self.tokenizer, folder, card, adapter_base):
            path = (folder / file.name).relative_to(self.run_dir)
            self.report(ArtifactEvent(name=file.name, path=str(path), size_bytes=file.size_bytes, sha256=file.sha256))

    def _card(self) -> ModelCard:
        run, stats = self.run, self.splits.stats
        return ModelCard(
            name=run.output_name,
            base_model=run.model_name or Path(run.model_path).name,
            method=self.training.method,
            pipeline_tag=_PIPELINE_TAGS[self.tuner.task],
            is_adapter=self.training.lora is not None and not run.merge,
            schedule=self.schedule.model_dump(mode="json"),
            hyper_parameters=self.training.model_dump(mode="json", exclude={"schedule", "method", "lora"}),
            adapter=self.training.lora.model_dump(mode="json") if self.training.lora is not None else {},
            dataset_name=run.dataset_name or Path(run.dataset_path).name,
            dataset_sha256=stats.sha256,
            num_train_rows=stats.num_train_rows,
            num_parameters=self._num_parameters(),
            num_trainable_parameters=self.tuner.stream.num_parameters,
            peak_allocated_bytes=self.peak_allocated_bytes,
            predicted_peak_bytes=run.predicted_peak_bytes,
            loss_before=self.evaluations[0].loss if self.evaluations else None,
            loss_after=self.evaluations[-1].loss if self.evaluations else None,
            held_out_losses=[(evaluation.step, evaluation.loss) for evaluation in self.evaluations],
            training_losses=self._training_losses(),
            license=base_license(Path(run.model_path)),
        )

    def _training_losses(self) -> list[tuple[int, float]]:
        """Mean loss of each tenth of the run, by its last update."""
        ends = [ceil_div((span + 1) * self.total_steps, _NUM_LOSS_SPANS) for span in range(_NUM_LOSS_SPANS)]
        return [(end, total / count) for end, (total, count) in zip(ends, self.loss_sums, strict=True) if count]
