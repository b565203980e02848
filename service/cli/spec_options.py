"""Command-line options that follow from a spec's fields: a new field is a new option, its line is
the help.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from chunkplan.engine.spec import LoraSpec, ScheduleSpec, SpecModel, TrainingSpec


@dataclass(frozen=True)
class _Group:
    """Fields of one spec, as options."""

    title: str
    spec: type[SpecModel]
    path: tuple[str, ...] = ()
    """Where the fields are within a training spec."""
    prefix: str = ""
    """Stands before every option's name."""
    left_out: frozenset[str] = frozenset()
    short: tuple[tuple[str, str], ...] = ()
    """Options that are called otherwise than their field: (field, option)."""


_GROUPS = (
    _Group(
        "Training",
        TrainingSpec,
        left_out=frozenset({"schedule", "lora"}),
        short=(("activation_checkpointing", "checkpointing"),),
    ),
    _Group("Schedule", ScheduleSpec, ("schedule",), short=(("num_chunks", "chunks"),)),
    _Group("Adapters (method lora)", LoraSpec, ("lora",), prefix="lora_"),
)


def with_training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for every field of a training spec, of its schedule and of its adapters.

    The command gets them as ``training``: nested values as a request has them, of what was given.
    """
    options = [option for group in _GROUPS for option in _options(group)]

    @wraps(command)
    def run(**given: Any) -> Any:
        training: dict[str, Any] = {}
        for option, path, field in options:
            value = given.pop(option.name)
            if value is None or value is False:
                continue
            place = training
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = _value(value, field)
        return command(**given, training=training)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [*(each for each in own if each.name != "training"), *(option for option, _, _ in options)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: _Group) -> list[tuple[inspect.Parameter, tuple[str, ...], FieldInfo]]:
    """Parameter, path within a training spec, and field, for each field of a group."""
    found = []
    for name, field in group.spec.model_fields.items():
        if name in group.left_out:
            continue
        called = group.prefix + dict(group.short).get(name, name)
        kind = _kind(field)
        flag = f"--{called.replace('_', '-')}"
        option = typer.Option(flag, help=_help(field), rich_help_panel=group.title, show_default=False)
        asked: Any = bool if kind is bool else kind | None
        annotation: Any = Annotated[asked, option]
        parameter = inspect.Parameter(
            called,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=annotation,
        )
        found.append((parameter, (*group.path, name), field))
    return found


def _kind(field: FieldInfo) -> type:
    """How the command line reads an option: as a flag, a number, or a text that :func:`_value`
    takes apart.
    """
    kinds = _plain_types(field.annotation)
    can_be_turned_off = NoneType in kinds and field.default is not None
    numbers = kinds - {NoneType}
    return next(iter(numbers)) if len(numbers) == 1 and numbers <= {bool, int, float} and not can_be_turned_off else str


def _plain_types(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _plain_types(part)}
    return {origin or annotation}


def _value(given: Any, field: FieldInfo) -> Any:
    """What is typed, as a request has it: ``null``, JSON, a list with commas, a number, or the
    text itself.
    """
    if not isinstance(given, str):
        return given
    kinds = _plain_types(field.annotation)
    is_json = given == "null" or given.startswith(("{", "[")) or (float in kinds and _is_number(given))
    if is_json:
        try:
            return json.loads(given)
        except ValueError:
            return given
    return given.split(",") if list in kinds and "," in given else given


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", text, re.IGNORECASE) is not None


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").replace("``", "").split())
    default = field.get_default(call_default_factory=True)
    is_said = default is None or default is False or "default" in text
    return text if is_said else f"{text.rstrip('.')}; default {getattr(default, 'value', default)}."
