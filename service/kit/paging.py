"""One envelope for every list, and keyset paging: a page starts after a row, never at a number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from fastapi import Depends, Query
from pydantic import BaseModel
from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from chunkplan.engine.errors import InputError
from chunkplan.service.kit.ids import is_well_formed


class Listed(BaseModel):
    """Base of everything that is listed: it has an id."""

    id: str

    @classmethod
    def from_row(cls, row: Any, **given: Any) -> Self:
        """The view of a stored row: each field is the row's column of that name, but for those given."""
        names = cls.model_fields.keys() - given.keys() - {"object"}
        return cls(**{name: getattr(row, name) for name in names}, **given)


Item = TypeVar("Item", bound=Listed)
Row = TypeVar("Row")


class Page(BaseModel, Generic[Item]):
    """A list, as the OpenAI clients read it."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, items: Sequence[Item], *, has_more: bool = False) -> Page[Item]:
        """A page of items."""
        return cls(
            data=list(items),
            has_more=has_more,
            first_id=items[0].id if items else None,
            last_id=items[-1].id if items else None,
        )


@dataclass(frozen=True)
class Window:
    """Which page was asked for."""

    after: str | None
    limit: int

    def number(self) -> int:
        """``after`` as the number of a row; 0, before the first one, when not given."""
        if self.after is None:
            return 0
        if not self.after.isascii() or not self.after.isdigit() or len(self.after) > 18:
            raise InputError("after", "should be the last_id of the page before")
        return int(self.after)


def _window(
    after: Annotated[str | None, Query(max_length=80, description="last_id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Window:
    return Window(after, limit)


def _long_window(
    after: Annotated[str | None, Query(max_length=80, description="last_id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Window:
    return Window(after, limit)


def _widest_window(
    after: Annotated[str | None, Query(max_length=80, description="last_id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
) -> Window:
    return Window(after, limit)


WindowDep = Annotated[Window, Depends(_window)]
LongWindowDep = Annotated[Window, Depends(_long_window)]
"""For rows that come by the thousand: events, metrics, samples."""
WidestWindowDep = Annotated[Window, Depends(_widest_window)]
"""For files, of which OpenAI's clients may ask for 10 000 at once."""

OptionalText = Annotated[str | None, Query(max_length=4096, pattern=r"^[^\x00]*$")]
"""A filter; no NUL, which Postgres cannot compare with."""


def newest_first(
    session: Session,
    statement: Select[Row],
    created_at: InstrumentedAttribute[Any],
    identifier: InstrumentedAttribute[str],
    window: Window,
    *,
    oldest_first: bool = False,
) -> tuple[list[Row], bool]:
    """One page of rows, newest first unless told otherwise, and whether there are more.

    Raises:
        InputError: ``after`` names no row.
    """
    place = tuple_(created_at, identifier)
    if window.after is not None:
        found = select(created_at).where(identifier == window.after).limit(1)
        known = session.scalar(found) if is_well_formed(window.after) else None
        if known is None:
            raise InputError("after", f"there is nothing with the id {window.after!r}")
        is_beyond = place > (known, window.after) if oldest_first else place < (known, window.after)
        statement = statement.where(is_beyond)
    order = [column if oldest_first else column.desc() for column in (created_at, identifier)]
    rows = session.scalars(statement.order_by(*order).limit(window.limit + 1)).all()
    return list(rows[: window.limit]), len(rows) > window.limit


def by_number(
    session: Session,
    statement: Select[Row],
    number: InstrumentedAttribute[int],
    window: Window,
    *,
    newest_first: bool = False,
) -> tuple[list[Row], bool]:
    """One page of numbered rows, in their order or in its reverse, and whether there are more."""
    if window.after is not None:
        statement = statement.where(number < window.number() if newest_first else number > window.number())
    statement = statement.order_by(number.desc() if newest_first else number)
    rows = session.scalars(statement.limit(window.limit + 1)).all()
    return list(rows[: window.limit]), len(rows) > window.limit
