"""``python -m preln.report.paper``."""

import sys

from preln.report.paper import main

sys.exit(main())
