"""`python -m ffvt COMMAND`."""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main())
