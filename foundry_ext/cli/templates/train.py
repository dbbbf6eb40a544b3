"""composer train.py a.yaml [b.yaml ...] [key=value ...]: see foundry_ext/launch/train.py."""

import sys

from foundry_ext.launch.train import main
from foundry_ext.utils.output import redact_output

if __name__ == "__main__":
    redact_output(is_progress=True)  # to the end of the process: a traceback comes after main
    sys.exit(main(__file__, sys.argv[1:]))
