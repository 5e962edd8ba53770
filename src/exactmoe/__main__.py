"""`python -m exactmoe`: the same as the command `exactmoe`."""

import sys

from exactmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
