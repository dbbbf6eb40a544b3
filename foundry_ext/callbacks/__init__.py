"""Composer callbacks, one file each, registered by entry point."""
