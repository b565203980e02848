"""What a language model is trained to do: predict the next token, masked tokens, or an answer from a prompt.

The three tasks differ in how a model is loaded, whether its labels shift, what a batch holds and how it is
made from a row's tokens. Nothing else in the engine knows about families.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from chunkplan.engine.arithmetic import round_up
from chunkplan.engine.data import LENGTH_MULTIPLE
from chunkplan.engine.data.tokens import IGNORE_INDEX
from chunkplan.engine.errors import InputError

MASKED_SHARE = 0.15
"""Share of a row's trained tokens that are predicted, as for BERT (arXiv 1810.04805, section 3.1)."""
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Shares of the predicted tokens that the mask, and a random token, replaces; the others stay."""


class Task(StrEnum):
    """What the model predicts."""

    CAUSAL = "causal"
    """The next token, from those before it."""
    MASKED = "masked"
    """Tokens that were hidden from it, from those on both sides."""
    SEQ2SEQ = "seq2seq"
    """An answer's next token, from the answer so far and a prompt that an encoder read as a whole."""

    @property
    def shifts_labels(self) -> bool:
        """True when the model compares position i with label i + 1, false when with label i."""
        return self is Task.CAUSAL

    @property
    def batch_keys(self) -> frozenset[str]:
        """What a batch may hold."""
        return _BATCH_KEYS[self]

    @property
    def auto_class(self) -> Any:
        """The class of transformers that builds and loads such a model."""
        return _AUTO_CLASSES[self]


_AUTO_CLASSES = {
    Task.CAUSAL: AutoModelForCausalLM,
    Task.MASKED: AutoModelForMaskedLM,
    Task.SEQ2SEQ: AutoModelForSeq2SeqLM,
}
_BATCH_KEYS = {
    Task.CAUSAL: frozenset({"input_ids", "labels", "attention_mask", "position_ids"}),
    Task.MASKED: frozenset({"input_ids", "labels", "attention_mask", "token_type_ids"}),
    Task.SEQ2SEQ: frozenset({"input_ids", "labels", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}),
}


@cache
def _masked_classes() -> frozenset[str]:
    names: set[str] = set()
    for value in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return frozenset(names)


def task_of(model: nn.Module) -> Task:
    """The task of a model, from its config and its class."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Task.SEQ2SEQ
    is_masked = any(kind.__name__ in _masked_classes() for kind in type(model).__mro__)
    return Task.MASKED if is_masked else Task.CAUSAL


def task_of_config(config: Any) -> Task:
    """The task of a transformers config: as its ``architectures`` say, else what its family is made for."""
    named = tuple(getattr(config, "architectures", None) or ())
    if any(name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in named):
        return Task.CAUSAL
    if getattr(config, "is_encoder_decoder", False):
        return Task.SEQ2SEQ
    kind = getattr(config, "model_type", "")
    is_masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return Task.MASKED if is_masked else Task.CAUSAL


def num_counted_tokens(labels: Tensor, task: Task = Task.CAUSAL) -> int:
    """Tokens that enter the loss: labels that are not ignored; a causal model predicts no first position."""
    counted = labels[:, 1:] if task.shifts_labels else labels
    return int((counted != IGNORE_INDEX).sum())


def model_inputs(model: nn.Module, batch: Mapping[str, Tensor], task: Task) -> dict[str, Any]:
    """Arguments of the model's forward: the batch without labels, and no cache.

    Causal models get no attention mask: real tokens never look at padding on their right. A decoder's inputs
    are made by the model itself, from the labels, where the batch has none.
    """
    dropped = {"labels", "attention_mask"} if task is Task.CAUSAL else {"labels"}
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in dropped}
    if task is Task.SEQ2SEQ and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = shifted_right(model, batch["labels"])
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    return inputs


def shifted_right(model: nn.Module, ids: Tensor) -> Tensor:
    """The decoder's inputs that make it predict ``ids``, [batch, length], by the model's own rule.

    Raises:
        InputError: the model has none.
    """
    rule: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if rule is None:
        raise InputError("model", f"{type(model).__name__} does not say how its decoder starts")
    shifted: Tensor = rule(labels=ids)
    return shifted


class BatchPreparation:
    """Makes of collated rows what the model's task needs; for causal models, nothing is to be done.

    Args:
        model: decides the task.
        tokenizer: names the mask, the special tokens and the end of a sequence.
        seq_len: longest sequence, of an encoder and of a decoder each.
        seed: with the batch's index, decides which tokens are masked.

    Raises:
        InputError: a masked model whose tokenizer has no mask token.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seq_len: int, seed: int) -> None:
        self.task = task_of(model)
        self._model, self._tokenizer, self._seq_len, self._seed = model, tokenizer, seq_len, seed
        if self.task is Task.MASKED and tokenizer.mask_token_id is None:
            raise InputError("model", "its tokenizer has no mask token, which a masked language model is trained with")

    def __call__(self, batch: dict[str, Tensor], lengths: Sequence[int], index: int) -> dict[str, Tensor]:
        """Inputs of one micro-batch, on the CPU.

        Args:
            batch: ``input_ids`` and ``labels``, [batch, width], padded on the right.
            lengths: tokens of each row.
            index: of the micro-batch in the run; negative for held-out ones. Equal indices mask equal tokens.

        Raises:
            InputError: an encoder-decoder model gets a row without a prompt.
        """
        if self.task is Task.MASKED:
            return self._masked(batch, lengths, index)
        return self._split(batch, lengths) if self.task is Task.SEQ2SEQ else batch

    def _masked(self, batch: dict[str, Tensor], lengths: Sequence[int], index: int) -> dict[str, Tensor]:
        input_ids, special = batch["input_ids"].clone(), torch.tensor(self._tokenizer.all_special_ids)
        is_candidate = (batch["labels"] != IGNORE_INDEX) & ~torch.isin(input_ids, special)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + index) % 2**63)
        order = torch.rand(input_ids.shape, generator=generator).masked_fill_(~is_candidate, 2.0).argsort(1)
        fate = torch.rand(input_ids.shape, generator=generator)
        random_ids = torch.randint(len(self._tokenizer), input_ids.shape, generator=generator)
        count = (is_candidate.sum(1) * MASKED_SHARE).round_().clamp_(min=1).minimum(is_candidate.sum(1))
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order).contiguous())
        is_chosen = rank < count.unsqueeze(1)
        labels = batch["labels"].masked_fill(~is_chosen, IGNORE_INDEX)
        input_ids.masked_fill_(is_chosen & (fate < MASK_SHARE), int(self._tokenizer.mask_token_id or 0))
        is_random = is_chosen & (fate >= MASK_SHARE) & (fate < MASK_SHARE + RANDOM_SHARE)
        input_ids[is_random] = random_ids[is_random]
        return {"input_ids": input_ids, "labels": labels, "attention_mask": _mask(lengths, input_ids.shape[1])}

    def _split(self, batch: dict[str, Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
        """Give the encoder what stands before the first trained token, the decoder everything from
        there on.
        """
        prompts, answers, labels = [], [], []
        end = self._tokenizer.eos_token_id
        for ids, targets, length in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            trained = (targets != IGNORE_INDEX).nonzero()
            first = int(trained[0]) if len(trained) else length
            if first == 0:
                raise InputError("dataset.path", "an encoder-decoder model needs rows with a prompt and a completion")
            closed = [] if end is None or int(ids[first - 1]) == end else [end]
            prompts.append([*ids[:first].tolist(), *closed])
            answers.append(ids[first:length].tolist())
            labels.append(targets[first:length].tolist())
        pad = int(self._model.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
        input_ids = self._padded(prompts, pad)
        return {
            "input_ids": input_ids,
            "attention_mask": _mask([len(row) for row in prompts], input_ids.shape[1]),
            "decoder_input_ids": shifted_right(self._model, self._padded(answers, pad)),
            "labels": self._padded(labels, IGNORE_INDEX),
        }

    def _padded(self, rows: list[list[int]], value: int) -> Tensor:
        width = max(len(row) for row in rows)
        width = min(round_up(width, LENGTH_MULTIPLE), self._seq_len)
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def _mask(lengths: Sequence[int], width: int) -> Tensor:
    """1 for real tokens and 0 for padding, int64, [batch, width]."""
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).to(torch.int64)
