"""Runs `python -m foundry_ext.cli`."""

import sys

from foundry_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
