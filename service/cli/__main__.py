"""``python -m chunkplan.service.cli``: the command without an installed script."""

import sys

from chunkplan.service.cli import main

sys.exit(main())
