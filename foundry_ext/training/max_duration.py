"""Checks of the YAML's max_duration against the checkpoint that a run resumes from."""

import logging

from composer.core import State, Time, TimeUnit

from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)


def check_change(state: State, before: Time | None) -> None:
    """Check a max_duration that is not the checkpoint's; a longer one is a warning.

    Args:
        state: the state that was loaded, with the YAML's max_duration.
        before: the duration in the checkpoint, if there is one.

    Raises:
        UserError: the checkpoint is already past it.
    """
    end = state.max_duration
    if before is None or end is None or repr(before) == repr(end):
        return
    reached, texts = state.timestamp.get(end.unit), (before.to_timestring(), end.to_timestring())
    if reached > end or (reached == end and before.unit == end.unit):
        raise UserError(
            f"max_duration: {texts[0]}, now {texts[1]}, which the checkpoint is already"
            " past; restore it, or give the run another run_name and save_folder"
        )
    log.warning(
        "max_duration: %s, now %s. A schedule that depends on it changes from here on", *texts
    )


def no_batch_is_left(state: State) -> bool:
    """Return whether the loaded state is at its end.

    A checkpoint of an epoch's last batch is saved before the epoch ends.
    """
    end, now, length = state.max_duration, state.timestamp, state.dataloader_len
    assert end is not None
    is_last_epoch = end.unit == TimeUnit.EPOCH and now.epoch + 1 == end
    ends_epoch = length is not None and now.batch_in_epoch >= length
    return now.get(end.unit) >= end or (is_last_epoch and ends_epoch)
