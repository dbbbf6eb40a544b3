"""The tiny world of the training tests, for whole processes."""

from tests.training.conftest import finished, one_thread, world

__all__ = ["finished", "one_thread", "world"]
