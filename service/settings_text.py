"""Settings as the TOML file that `CHUNKPLAN_SETTINGS_FILE` could name; a password in them is not shown."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import make_url

from service.settings import Settings


def shown(settings: Settings) -> dict[str, Any]:
    """Every setting as JSON."""
    values = settings.model_dump(mode="json")
    url = make_url(settings.database_url)
    return values if url.password is None else values | {"database_url": url.render_as_string(hide_password=True)}


def as_toml(settings: Settings) -> str:
    """Every setting, as it is in force."""
    lines, tables = _lines(shown(settings))
    for name, table in tables.items():
        if name == "project_quotas":
            for project, quota in table.items():
                lines += ["", f"[project_quotas.{_text(project)}]", *_lines(quota)[0]]
        else:
            lines += ["", f"[{name}]", *_lines(table)[0]]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """``name = value`` of all but tables, and the tables."""
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    return [f"{name} = {_text(value)}" for name, value in plain.items()], tables


def _text(value: Any) -> str:
    """Strings, numbers, truth values and lists of them are written alike in JSON and TOML."""
    return json.dumps(value, ensure_ascii=False)
