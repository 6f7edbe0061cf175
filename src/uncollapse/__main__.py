"""`python -m uncollapse`."""

import sys

from uncollapse.cli import main

sys.exit(main())
