"""Subcommands of `foundry-ext`, one file each: `add_arguments(parser)` and `run(arguments)`."""
