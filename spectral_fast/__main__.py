"""`python -m spectral_fast` is `spectral-fast`."""

import sys

from spectral_fast.cli import main

sys.exit(main())
