"""`python -m sparsebert` is the `sparsebert` command."""

import os
import sys

try:
    from sparsebert.cli import main

    code = main()
except KeyboardInterrupt:  # before main could handle it
    code = 130
if code == 130:
    # Under -m the interpreter may raise the signal again at exit, and the code would be lost.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
