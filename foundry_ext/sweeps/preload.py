"""The imports of every forked run, done once by the fork server (fork_launcher.py).

The server must import and do nothing else: a child forked after torch has computed in several
threads hangs.
"""

import contextlib
import gc
import importlib
import os
import sys

IMPORTS = (
    "composer",
    "llmfoundry.command_utils",
    "peft",
    "foundry_ext.launch.train",
    "foundry_ext.training.model",
    "foundry_ext.data.dataloader",
)

os.setsid()  # a terminal's Ctrl-C is for the sweep alone
try:
    # Anything on stdout means that the server is ready.
    with contextlib.redirect_stdout(sys.stderr):
        for name in IMPORTS:
            importlib.import_module(name)
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        # Composer asks for every causal model of transformers, which takes five seconds to import.
        list(MODEL_FOR_CAUSAL_LM_MAPPING.values())
except ImportError as error:  # which multiprocessing would ignore
    raise RuntimeError("the imports of a run failed") from error
gc.freeze()  # keeps the garbage collector of every child away from what was imported here
os.write(1, b"ready\n")
