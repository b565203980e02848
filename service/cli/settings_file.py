"""Settings as the TOML file that `CHUNKPLAN_SETTINGS_FILE` could name; a password in them is not shown."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import make_url

from chunkplan.service.settings import Settings


def shown(settings: Settings) -> dict[str, Any]:
    """Every setting as JSON."""
    values = settings.model_dump(mode="json")
    url = make_url(settings.database_url)
    return values if url.password is None else values | {"database_url": url.render_as_string(hide_password=True)}


def as_toml(settings: Settings) -> str:
    """Every setting, as it is in force."""
    lines, tables = _lines(shown(settings))
    for name, table in tables.items():
        if isinstance(table, list):
            for element in table:
                lines += ["", f"[[{name}]]", *_lines(element)[0]]
        elif name == "project_quotas":
            for project, quota in table.items():
                lines += ["", f"[project_quotas.{_text(project)}]", *_lines(quota)[0]]
        else:
            lines += ["", f"[{name}]", *_lines(table)[0]]
    return "\n".join(lines) + "\n"


def _lines(values: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """``name = value`` of all but tables and lists of tables, and those; what is None is left out."""
    tables = {name: value for name, value in values.items() if _is_table(value)}
    plain = {name: value for name, value in values.items() if name not in tables and value is not None}
    return [f"{name} = {_text(value)}" for name, value in plain.items()], tables


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _text(value: Any) -> str:
    """Strings, numbers, truth values and lists of them are written alike in JSON and TOML."""
    return json.dumps(value, ensure_ascii=False)
