"""`python -m ffvt.train FLAGS`, alone or as `torchrun ... -m ffvt.train FLAGS`: the same as `ffvt train FLAGS`."""

import sys

from ffvt.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
