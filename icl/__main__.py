"""`python -m icl` is the command `icl`."""

import sys

from icl.cli import main

if __name__ == "__main__":
    sys.exit(main())
