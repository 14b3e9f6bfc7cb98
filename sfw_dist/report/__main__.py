"""``python -m sfw_dist.report``."""

from __future__ import annotations

import sys

from sfw_dist.report.command import main

sys.exit(main())
