"""Fused linear cross-entropy: the language-model loss without ever holding the logits of all tokens.

The model's own loss keeps three fp32 tensors of [tokens, vocabulary]; here the logits exist for a block of
tokens at a time, and their gradient is consumed at once. Works with a frozen, a whole and a cut head: only
the active rows get a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chunkplan.engine.gradients.cut_parameter import CutParameter
from chunkplan.engine.model.autocast import autocast_operands

IGNORE_INDEX = -100
_BLOCK_BYTES = 16 * 2**20
_BLOCK_TOKENS = 128


def block_tokens(vocab_size: int) -> int:
    """Tokens per block: fp32 logits of 16 MiB, but at least 128, below which the weight's traffic
    dominates.
    """
    return max(_BLOCK_TOKENS, _BLOCK_BYTES // (4 * vocab_size))


def block_rows(vocab_size: int, num_tokens: int) -> int:
    """Rows of the head per block of its gradient, over all tokens: as many logits as in a block of tokens."""
    return max(1, block_tokens(vocab_size) * vocab_size // num_tokens)


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a family does between head and softmax: logits → cap · tanh(scale · logits / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitTransform:
        """Return what a transformers config says (``final_logit_softcapping``, Cohere's and Granite's
        scales).
        """
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))

    def apply_(self, logits: Tensor) -> Tensor | None:
        """Transform fp32 logits in place; returns tanh(…) when it is needed for the gradient."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is None:
            return None
        logits.div_(self.softcap).tanh_()
        tanh = logits.clone()
        logits.mul_(self.softcap)
        return tanh

    def backward_(self, gradient: Tensor, tanh: Tensor | None) -> Tensor:
        """Chain rule in place: gradient of the raw product from the gradient of the transformed logits."""
        if tanh is not None:
            gradient.mul_(tanh.square_().neg_().add_(1.0))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Token losses over ``denominator``, whose gradients are computed in forward, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        labels: Tensor,
        denominator: float,
        rows: tuple[int, int],
        transform: LogitTransform,
    ) -> Tensor:
        needs_hidden, needs_target, needs_bias = ctx.needs_input_grad[:3]
        start, stop = rows
        num_tokens, width = hidden.shape
        result_dtypes, bias_dtype = (hidden.dtype, weight.dtype), None if bias is None else bias.dtype
        hidden, weight, bias = autocast_operands(hidden, weight, bias)
        block = block_tokens(weight.shape[0])
        losses = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden, dtype=result_dtypes[0]) if needs_hidden else None
        d_target = (
            weight.new_empty(target.shape, dtype=result_dtypes[1]) if needs_target and target is not None else None
        )
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        log_norms = hidden.new_empty(num_tokens, dtype=torch.float32) if needs_target else None
        for i in range(0, num_tokens, block):
            part = slice(i, i + block)
            logits, tanh = _logits(hidden[part], weight, bias, transform)
            log_norm, loss = _softmax_(logits, labels[part])
            losses += loss / denominator
            if log_norms is not None:
                log_norms[part] = log_norm
            if d_hidden is None and d_bias is None:
                del logits, tanh  # before the next block's are made
                continue
            d_logits = _softmax_gradient_(logits, labels[part], 0, denominator)
            d_logits = transform.backward_(d_logits, tanh)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            if d_hidden is not None:
                _mm_into(d_hidden[part], d_logits.to(weight.dtype), weight)
            del logits, d_logits, tanh
        if d_target is not None and log_norms is not None:
            d_rows = d_target.view(stop - start, width)
            _weight_gradient(d_rows, hidden, weight, bias, labels, log_norms, denominator, rows, transform)
        if any(ctx.needs_input_grad):
            ctx.gradients = (d_hidden, d_target, d_bias)
            ctx.bias_dtype = bias_dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Handed out, not kept: autograd adds a tied embedding's gradient in place only to what nobody else
        # holds.
        d_hidden, d_target, d_bias = ctx.gradients
        del ctx.gradients
        for gradient in (d_hidden, d_target, d_bias):
            if gradient is not None:
                gradient.mul_(upstream)
        if d_bias is not None:
            d_bias = d_bias.to(ctx.bias_dtype)
        return d_hidden, d_target, d_bias, None, None, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor | None]:
    """Return a block's fp32 logits [tokens, rows of weight], transformed, and what their gradient needs."""
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits, transform.apply_(logits)


def _mm_into(result: Tensor, left: Tensor, right: Tensor) -> None:
    """The matrix product, converted when autocast computes it in another type than the result's."""
    if result.dtype == left.dtype:
        torch.mm(left, right, out=result)
    else:
        result.copy_(torch.mm(left, right))


def _softmax_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities in place; return log normaliser [tokens] and summed loss."""
    valid = labels != IGNORE_INDEX
    index = labels.clamp_min(0).unsqueeze(1)
    at_label = logits.gather(1, index).squeeze(1)
    highest = logits.amax(1)
    logits.sub_(highest.unsqueeze(1)).exp_()
    total = logits.sum(1)
    logits.div_(total.unsqueeze(1))
    log_norm = total.log_().add_(highest)
    loss = (log_norm - at_label).mul_(valid).sum()
    return log_norm, loss


def _softmax_gradient_(probabilities: Tensor, labels: Tensor, first_row: int, denominator: float) -> Tensor:
    """Compute (p − onehot) / denominator in place for rows from ``first_row`` on; zero for ignored tokens."""
    num_rows = probabilities.shape[1]
    local = labels - first_row
    hit = (local >= 0) & (local < num_rows)
    probabilities.scatter_add_(1, local.clamp_(0, num_rows - 1).unsqueeze(1), -hit.to(probabilities.dtype).unsqueeze(1))
    weight = (labels != IGNORE_INDEX).to(probabilities.dtype).div_(denominator)
    return probabilities.mul_(weight.unsqueeze(1))


def _weight_gradient(
    d_target: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    log_norms: Tensor,
    denominator: float,
    rows: tuple[int, int],
    transform: LogitTransform,
) -> None:
    """Return the gradient of vocabulary rows [start, stop), each row as one product over all tokens."""
    start, stop = rows
    block = block_rows(weight.shape[0], hidden.shape[0])
    for first in range(start, stop, block):
        last = min(first + block, stop)
        bias_rows = None if bias is None else bias[first:last]
        logits, tanh = _logits(hidden, weight[first:last], bias_rows, transform)
        logits.sub_(log_norms.unsqueeze(1)).exp_()
        d_logits = transform.backward_(_softmax_gradient_(logits, labels, first, denominator), tanh)
        _mm_into(d_target[first - start : last - start], d_logits.to(weight.dtype).t(), hidden)
        del logits, d_logits, tanh


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    denominator: float,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T`` and ``labels``, summed, over ``denominator``.

    Args:
        hidden: [tokens, hidden size], already shifted against the labels.
        weight: [vocabulary, hidden size]; frozen, trainable, or cut.
        labels: [tokens], int64; −100 is not counted.
        denominator: usually the number of counted tokens, over all micro-batches of an update.
        bias: [vocabulary] or None.
        transform: scale and softcap of the family.
    """
    if isinstance(weight, CutParameter):
        cut = weight.rows
        target, dense, rows = cut.leaf, cut.weight, (cut.start, cut.stop)
    else:
        target, dense, rows = weight, weight.detach(), (0, weight.shape[0])
    if not torch.is_grad_enabled():  # a function is told which inputs require gradients, not whether anybody wants them
        hidden, target, bias = hidden.detach(), target.detach(), None if bias is None else bias.detach()
    result: Tensor = _FusedLinearCrossEntropy.apply(
        hidden, target, bias, dense, labels, float(denominator), rows, transform or LogitTransform()
    )
    return result
