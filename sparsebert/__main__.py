"""`python -m sparsebert` is the `sparsebert` command."""

import sys

from sparsebert.cli import main

sys.exit(main())
