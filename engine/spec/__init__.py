"""What can be asked of a training run, shared by engine, planner and service. Imports no torch.

``base``: what specs are made of; ``choices``, ``schedule``, ``step``, ``training``: the training spec, and
``refusals``: what does not go together in it; ``request``: what a user submits; ``run``: what the worker
gets.
"""

from chunkplan.engine.spec.base import (
    Choice,
    SpecModel,
    deepest_error,
    error_field,
    parse,
)
from chunkplan.engine.spec.choices import (
    Master,
    Optimizer,
    Order,
    Precision,
    StateDtype,
)
from chunkplan.engine.spec.refusals import (
    REFUSALS,
    RefusedPair,
    refusal_of,
)
from chunkplan.engine.spec.request import (
    DatasetSpec,
    JobRequest,
    MetadataKey,
    MetadataValue,
    ModelConfig,
    ModelPath,
    ModelRef,
    OutputSpec,
)
from chunkplan.engine.spec.run import (
    RunSpec,
)
from chunkplan.engine.spec.schedule import (
    DEFAULT_NUM_CHUNKS,
    ResolvedSchedule,
    ScheduleSpec,
    default_schedule,
)
from chunkplan.engine.spec.step import (
    CheckpointedLayers,
    StepSpec,
)
from chunkplan.engine.spec.training import (
    AskedJobTraining,
    AskedTraining,
    JobTraining,
    LoraSpec,
    ResolvedJobTraining,
    ResolvedTraining,
    TrainingSpec,
)

__all__ = [
    "DEFAULT_NUM_CHUNKS",
    "REFUSALS",
    "AskedJobTraining",
    "AskedTraining",
    "CheckpointedLayers",
    "Choice",
    "DatasetSpec",
    "JobRequest",
    "JobTraining",
    "LoraSpec",
    "Master",
    "MetadataKey",
    "MetadataValue",
    "ModelConfig",
    "ModelPath",
    "ModelRef",
    "Optimizer",
    "Order",
    "OutputSpec",
    "Precision",
    "RefusedPair",
    "ResolvedJobTraining",
    "ResolvedSchedule",
    "ResolvedTraining",
    "RunSpec",
    "ScheduleSpec",
    "SpecModel",
    "StateDtype",
    "StepSpec",
    "TrainingSpec",
    "deepest_error",
    "default_schedule",
    "error_field",
    "parse",
    "refusal_of",
]
