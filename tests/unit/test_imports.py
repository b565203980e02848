"""What must stay light: servers, specs and the command line start without torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("engine", "torch transformers"),
        ("chunkplan.engine", "torch transformers"),
        ("chunkplan.engine.data", "torch transformers"),
        ("planner", "torch transformers fastapi sqlalchemy matplotlib"),
        ("chunkplan.service.app", "torch transformers matplotlib"),
        ("chunkplan.service.cli.entry", "torch transformers fastapi sqlalchemy uvicorn matplotlib"),
        ("chunkplan.service.demo.run", "torch transformers matplotlib"),
    ],
)
def test_a_module_imports_nothing_heavy(module, absent):
    code = f"import sys, {module}; print([name for name in {absent.split()} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
