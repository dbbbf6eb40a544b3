"""Settings that were `auto` when a run started (config/automatic.py), kept when it resumes.

A run that began on a CPU, or with an earlier version, and continues on a GPU would otherwise change
its kernels on the way. Its checkpoint's settings hold what it began with.
"""

import logging
from dataclasses import replace
from typing import Any

from foundry_ext.config.automatic import AUTO, COMPILE, EARLIER, FIXED_SHAPE, LOSS
from foundry_ext.data.dataset import PackedDataset
from foundry_ext.models.compiled import compile_model
from foundry_ext.records.result_settings import Saved
from foundry_ext.utils.nested import put

log = logging.getLogger(__name__)


def keep_choices(model: Any, dataset: Any, *, before: Saved, now: Saved) -> Saved:
    """Give a run that resumes what it began with, and return its settings with that.

    Nothing is kept if one of compile and fixed_shape was given, because it decides the other.

    Args:
        model: the Composer model; the launcher has named in `automatic` what was not given.
        dataset: the train loader's.
        before: the checkpoint's settings.
        now: those of the run.
    """
    automatic = getattr(model, "automatic", ())
    if not {COMPILE, FIXED_SHAPE} <= {*automatic} or not isinstance(dataset, PackedDataset):
        return now
    model.kept = {key: _begun_with(before, key) for key in automatic}
    scope = model.kept[COMPILE]
    if scope != model.compile_scope:
        log.warning("compile: auto stays %r, as in the checkpoint", scope)
        model.compile_scope = scope
        compile_model(model.inner_model, scope=scope, mode=model.compile_mode)
    if LOSS in model.kept:
        model.inner_model.loss_implementation = model.kept[LOSS]
    dataset.collator = replace(dataset.collator, fixed_shape=model.kept[FIXED_SHAPE])
    given = {key: value for key, value in now.given.items() if key not in automatic}
    given |= {key: before.given[key] for key in automatic if key in before.given}
    return now._replace(given=given)


def _begun_with(before: Saved, key: str) -> Any:
    """Return a setting's value in the checkpoint.

    It is `auto` where something other than train.py trained, which decided nothing.
    """
    _, value = before.given.get(key, (None, AUTO))
    return EARLIER[key] if value in (None, AUTO) else value


def with_kept(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return a run's configuration with what its model keeps of the checkpoint."""
    for key, value in getattr(model, "kept", {}).items():
        config = put(config, key, value)
    return config
