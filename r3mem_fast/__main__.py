"""`python -m r3mem_fast` is the `r3mem` command."""

import sys

from .cli import main

sys.exit(main())
