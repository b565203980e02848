"""Options of a step, in few words."""

from chunkplan.engine.spec import StepSpec


def step_options(loss="fused", activation_checkpointing="none", autocast="none"):
    """A step's options by what tests vary."""
    return StepSpec(loss=loss, activation_checkpointing=activation_checkpointing, autocast=autocast)
