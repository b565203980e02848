"""What every spec is made of, and how a value becomes one: models, choices by name, parsing, fields of
errors.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from chunkplan.engine.errors import InputError


class SpecModel(BaseModel):
    """Base of every request model: unknown fields and values of another type are errors, instances are
    immutable.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Choice(StrEnum):
    """Base of what a request chooses from, by name."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Choice], handler: GetCoreSchemaHandler) -> CoreSchema:
        names_come_as_plain_strings = {"strict": False}
        return cast(CoreSchema, {**handler(source), **names_come_as_plain_strings})


def validation_field(location: tuple[int | str, ...]) -> str:
    """Dotted field name of a pydantic error location, without the union-branch labels that
    pydantic inserts.
    """
    labels = {"ScheduleSpec", "ModelPath", "ModelConfig", "CheckpointedLayers", "constrained-str", "body", "GpuSpec"}
    parts = [str(part) for part in location]
    return ".".join(p for p in parts if p not in labels and not p.startswith(("literal[", "function-", "dict[")))


Spec = TypeVar("Spec", bound=BaseModel)


def parse(spec: type[Spec], value: object) -> Spec:
    """Validate ``value`` (a dict or JSON text) against ``spec``.

    Raises:
        InputError: names the first offending field and what it should be.
    """
    try:
        if isinstance(value, str | bytes):
            return spec.model_validate_json(value)
        return spec.model_validate(value)
    except ValidationError as error:
        first = deepest_error(error)
        raise InputError(first[0], first[1]) from error


def deepest_error(error: ValidationError) -> tuple[str, str]:
    """(field, message) of the error that says most: in a union, the branch that got furthest into
    the value.
    """
    best = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
    message = best["msg"].removeprefix("Value error, ")
    given = best.get("input")
    if isinstance(given, str | int | float) and not isinstance(given, bool) and len(str(given)) <= 100:
        message = f"{message} (got {given!r})"
    return validation_field(best["loc"]) or "request", message
