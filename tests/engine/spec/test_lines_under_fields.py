"""The line under a field is its description, however its default is given, and changes nothing else."""

from typing import Annotated

import pytest
from pydantic import Field

from chunkplan.engine.errors import InputError
from chunkplan.engine.spec import SpecModel, parse


class Described(SpecModel):
    required: int
    """Line of required."""
    plain: int = 1
    """Line of plain."""
    bounded: Annotated[int, Field(gt=0)] = 2
    """Line of bounded."""
    with_field: int = Field(default=3, gt=2)
    """Line of with_field."""
    with_factory: list[int] = Field(default_factory=lambda: [4], max_length=1)
    """Line of with_factory."""
    without_line: int = Field(default=5, lt=6)


def test_every_field_has_its_line():
    lines = {name: field.description for name, field in Described.model_fields.items()}
    assert lines == {name: f"Line of {name}." for name in lines if name != "without_line"} | {"without_line": None}


def test_defaults_stay():
    values = parse(Described, {"required": 0}).model_dump()
    assert values == {
        "required": 0,
        "plain": 1,
        "bounded": 2,
        "with_field": 3,
        "with_factory": [4],
        "without_line": 5,
    }


@pytest.mark.parametrize(
    "changes", [{"bounded": 0}, {"with_field": 2}, {"with_factory": [1, 2]}, {"without_line": 6}], ids=str
)
def test_bounds_stay(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        parse(Described, {"required": 0, **changes})
