"""The real server with a time of day that can be set: ``CLOCK_OFFSET_FILE`` holds how many
seconds it is off.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta
from pathlib import Path

from chunkplan.service.kit.clock import SystemClock
from chunkplan.service.serve import serve
from chunkplan.service.settings import Settings


class JumpingClock(SystemClock):
    """The machine's clock, and what the file adds."""

    def now(self) -> datetime:
        """As somebody has set it."""
        return super().now() + timedelta(seconds=float(Path(os.environ["CLOCK_OFFSET_FILE"]).read_text()))


if __name__ == "__main__":
    serve(Settings(), JumpingClock())
    sys.exit(0)
