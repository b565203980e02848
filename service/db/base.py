"""Declarative base, naming convention and column types."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Enum, ForeignKey, Integer, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A UTC-aware time; SQLite, which stores no zone, gives it back aware too."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive time cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of every table."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own protocol
        datetime: UtcDateTime(),
        int: BigInteger(),
        dict[str, Any]: JSON(),
        list[Any]: JSON(),
    }


def choice(values: type[StrEnum]) -> Enum:
    """A text column that holds one of an enum's values; checked by the code, so that new values need no
    migration.
    """
    return Enum(
        values,
        native_enum=False,
        length=24,
        create_constraint=False,
        values_callable=lambda cls: [v.value for v in cls],
    )


BigKey = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite counts up by itself only for INTEGER PRIMARY KEY."""

Identifier = Annotated[str, mapped_column(String(64))]
Name = Annotated[str, mapped_column(String(256))]
Digest = Annotated[str, mapped_column(String(64))]
Reference = Annotated[str, mapped_column(String(4096))]
"""A model as it was asked for: a catalog id or a path."""

DEFAULT_PROJECT = "default"
"""Whose everything is that is asked for without a key."""


class Owned:
    """A row that belongs to a project."""

    project: Mapped[Name] = mapped_column()


class OfJob:
    """A row that belongs to its job's project."""

    job_id: Mapped[Identifier] = mapped_column(ForeignKey("jobs.id"))
