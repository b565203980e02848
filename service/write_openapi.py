"""Writes the API's description as it is kept in docs/openapi.json, which a test compares with the code.

Run: ``python -m chunkplan.service.write_openapi docs/openapi.json``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from chunkplan.service.app import create_app
from chunkplan.service.http.openapi import describe
from chunkplan.service.settings import Settings


def kept_document() -> str:
    """The document of this code as it is kept; the version number is left to the running service."""
    with tempfile.TemporaryDirectory() as folder:
        app = create_app(Settings(data_dir=Path(folder), database_url=f"sqlite:///{folder}/openapi.db"))
        document = describe(app)
        app.state.services.database.dispose()
    document["info"]["version"] = "0"
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(kept_document())
