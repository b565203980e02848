"""What the fields of a training spec choose from, by name."""

from __future__ import annotations

from chunkplan.engine.spec.base import Choice


class Order(Choice):
    """In which order a cycle visits the chunks; chunk 0 is the start of the stream (the embedding)."""

    DESCENDING = "descending"
    ASCENDING = "ascending"
    RANDOM = "random"


class Precision(Choice):
    """Data type of the weights and of the computation."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is Precision.FP32 else 2


class Optimizer(Choice):
    """Which rule updates the active chunk."""

    ADAMW = "adamw"
    ADAMW8BIT = "adamw8bit"
    """AdamW with ``state_dtype: int8``."""
    ADAFACTOR = "adafactor"
    LION = "lion"
    SGD = "sgd"
    ADAGRAD = "adagrad"
    RMSPROP = "rmsprop"


class StateDtype(Choice):
    """How optimizer states are stored; they are computed in fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    """8-bit codes, and an fp32 scale per 256 of them."""


class Master(Choice):
    """What keeps the precision that bf16 weights lack."""

    NONE = "none"
    FP32 = "fp32"
    RESIDUAL = "residual"
