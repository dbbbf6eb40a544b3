"""Subcommands of foundry-ext, one module each."""
