"""Composer's autoresume, led to a checkpoint that a callback has chosen."""

import functools
import os
from typing import Any

from composer.core import Callback
from composer.trainer import Trainer

from foundry_ext.training.run_description import find_callback


def load_what_is_chosen(kind: type[Callback]) -> None:
    """Make autoresume load the path in the attribute `resumed_from` of a run's callback, if any.

    Composer 0.32.1 follows the `latest` link after `before_load`. The link may be missing or lead
    to a damaged checkpoint, and it must not be changed while the start may still be refused.

    Args:
        kind: the callback's class.
    """
    follow_link: Any = Trainer._get_autoresume_checkpoint

    @functools.wraps(follow_link)
    def choose(trainer: Trainer, *args: Any, **kwargs: Any) -> str | None:
        chosen = getattr(find_callback(trainer.state, kind), "resumed_from", None)
        return os.path.abspath(chosen) if chosen else follow_link(trainer, *args, **kwargs)

    setattr(Trainer, "_get_autoresume_checkpoint", choose)  # noqa: B010
