"""composer train.py a.yaml [b.yaml ...] [key=value ...]: see foundry_ext/launch/train.py."""

import sys

from foundry_ext.launch.train import main

if __name__ == "__main__":
    sys.exit(main(__file__, sys.argv[1:]))
