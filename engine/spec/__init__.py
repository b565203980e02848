"""What can be asked of a training run, shared by engine, planner and service. Imports no torch.

``base``: what specs are made of; ``training``: the step and the job's rates; ``request``: what a user
submits; ``run``: what the worker gets.
"""

from chunkplan.engine.spec.base import (
    Choice,
    Spec,
    SpecModel,
    deepest_error,
    parse,
    validation_field,
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
from chunkplan.engine.spec.training import (
    CheckpointedLayers,
    JobTraining,
    LoraSpec,
    Master,
    Optimizer,
    Order,
    Precision,
    ResolvedSchedule,
    ResolvedTraining,
    ScheduleSpec,
    StateDtype,
    TrainingSpec,
    default_schedule,
    resolved_state_dtype,
)

__all__ = [
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
    "ResolvedSchedule",
    "ResolvedTraining",
    "RunSpec",
    "ScheduleSpec",
    "Spec",
    "SpecModel",
    "StateDtype",
    "TrainingSpec",
    "deepest_error",
    "default_schedule",
    "parse",
    "resolved_state_dtype",
    "validation_field",
]
