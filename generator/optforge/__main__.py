"""`python -m optforge` is the command line."""

import os
import sys

# `python -m` looks for modules in the current directory first, where a rule's file may have any others beside it.
if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.getcwd()):
    del sys.path[0]

from .cli import main

if __name__ == "__main__":
    main()
