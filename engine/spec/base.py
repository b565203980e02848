"""What specs are made of, and how a value becomes one: models, choices by name, parsing, fields' names."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticUndefined

from chunkplan.engine.errors import InputError


class SpecModel(BaseModel):
    """Base of every request: unknown fields and values of another type are errors, instances immutable.

    The line under a field is its description wherever the field is shown: in ``--help`` and in the API's
    document.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # pydantic's use_attribute_docstrings takes three times as long: it reads the source for each class.
        for name, line in _lines_under_fields(cls.__module__).get(cls.__qualname__, {}).items():
            default = cls.__dict__.get(name, PydanticUndefined)
            if isinstance(default, FieldInfo):
                setattr(cls, name, FieldInfo.merge_field_infos(default, description=line))
            elif name in inspect.get_annotations(cls):
                setattr(cls, name, Field(default, description=line))


@cache
def _lines_under_fields(module: str) -> dict[str, dict[str, str]]:
    """Return the text under each annotated name of a module's classes, by class and name."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            lines = found.setdefault(node.name, {})
            for field, text in pairwise(node.body):
                if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                    continue
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    lines[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


class Choice(StrEnum):
    """Base of what a request chooses from, by name."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Choice], handler: GetCoreSchemaHandler) -> CoreSchema:
        names_come_as_plain_strings = {"strict": False}
        return cast(CoreSchema, {**handler(source), **names_come_as_plain_strings})


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
    """Return (field, message) of the error that says most: in a union, of the branch that got furthest."""
    best = max(error.errors(include_url=False), key=lambda item: len(_location(item)))
    message = best["msg"].removeprefix("Value error, ")
    given = best.get("input")
    if isinstance(given, str | int | float) and not isinstance(given, bool) and len(str(given)) <= 100:
        message = f"{message} (got {given!r})"
    return error_field(best) or "request", message


def error_field(error: Mapping[str, Any], *, skip: int = 0) -> str:
    """Return the dotted name of the field that a pydantic error is about, as the user wrote it.

    A refusal names a field below the spec that it belongs to (its context says which); the labels of union
    branches, which pydantic puts between the names, are left out.

    Args:
        error: one of ``ValidationError.errors()``.
        skip: how many parts at the beginning do not belong to the request.
    """
    branches = {model.__name__ for model in _all_models(SpecModel)}
    parts = [str(part) for part in _location(error)[skip:]]
    return ".".join(
        part
        for part in parts
        if part not in branches and not part.startswith(("literal[", "function-", "dict[", "constrained-"))
    )


def _location(error: Mapping[str, Any]) -> tuple[int | str, ...]:
    refused = error.get("ctx", {}).get("field", "")
    return (*error["loc"], *(refused.split(".") if refused else ()))


def _all_models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for model in base.__subclasses__():
        yield model
        yield from _all_models(model)
