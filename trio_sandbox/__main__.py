"""``python -m trio_sandbox`` is the command ``trio-sandbox``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
