"""`python -m r3mem_fast.cli` is the `r3mem` command."""

import sys

from .main import main

sys.exit(main())
