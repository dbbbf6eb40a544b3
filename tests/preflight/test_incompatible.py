"""Components that cannot work with packs are refused before training, by their class."""

import composer.algorithms
import llmfoundry.registry
import pytest
from composer.core import Callback

from foundry_ext.preflight.components import SECTIONS, registered
from foundry_ext.preflight.incompatible import _NOT_PACKED, check_loggers, check_on_packs
from foundry_ext.utils.errors import UserError

PACKED = {"train_loader": {"name": "packed_text"}, "model": {"name": "hf_causal_lm"}}
PADDED = {"train_loader": {"name": "text"}}
WORKING = {
    "algorithms": ("gradient_clipping", "low_precision_layernorm"),
    "callbacks": (
        *("lr_monitor", "memory_monitor", "speed_monitor", "runtime_estimator", "nan_monitor"),
        *("optimizer_monitor", "generate_callback", "early_stopper", "hf_checkpointer", "guard"),
        *("forgetting", "run_record", "kill_loss_spike", "scheduled_gc", "fdiff_metrics"),
    ),
}


def known(section: str, name: str):
    return registered(section, name, SECTIONS[section])


def classes() -> dict[str, type]:
    callbacks = {"eval_output_logging", "loss_perp_v_len", "curriculum_learning"}
    found = [known("callbacks", name) for name in callbacks]
    found += [one for one in vars(composer.algorithms).values() if isinstance(one, type)]
    return {one.__name__: one for one in found if one.__name__ in _NOT_PACKED}


@pytest.mark.parametrize("name", sorted(_NOT_PACKED))
def test_a_class_that_reads_padded_batches_is_refused(name):
    component = classes()[name]
    with pytest.raises(UserError, match=r"^algorithms.mine: with packed_text, it .*; \w+"):
        check_on_packs("algorithms.mine", component, PACKED)
    with pytest.raises(UserError):
        check_on_packs("algorithms.mine", type("Mine", (component,), {}), PACKED)
    check_on_packs("algorithms.mine", component, PADDED)


def test_others_are_not():
    for section, names in WORKING.items():
        for name in names:
            check_on_packs(f"{section}.{name}", known(section, name), PACKED)
    own = type("LabelSmoothing", (Callback,), {})  # a user's, of the same name
    check_on_packs("callbacks.mine", own, PACKED)


def test_a_stock_model_does_not_get_packs():
    """It ignores cu_seqlens, so that documents would attend to one another."""
    for name in ("hf_causal_lm", "mpt_causal_lm"):
        component = llmfoundry.registry.models.get(name)
        with pytest.raises(UserError, match=r"see one another .*set it to smollm2_packed"):
            check_on_packs("model", component, PACKED)
        check_on_packs("model", component, PADDED)
    check_on_packs("model", llmfoundry.registry.models.get("smollm2_packed"), PACKED)


@pytest.mark.parametrize("mode", ["offline", "disabled", "online"])
@pytest.mark.parametrize("by_variable", [True, False])
def test_composer_s_wandb_logger_offline_beside_autoresume(monkeypatch, mode, by_variable):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = {} if by_variable else {"init_kwargs": {"mode": mode}}
    if by_variable:
        monkeypatch.setenv("WANDB_MODE", mode)
    config = {"loggers": {"wandb": logger}, "autoresume": True, "save_folder": "x"}
    for change in (
        {"autoresume": False},
        {"save_folder": None},
        {"loggers": {"wandb_metrics": {}}},
    ):
        check_loggers(config | change)
    if mode == "online":
        check_loggers(config)
        return
    with pytest.raises(UserError, match="write wandb_metrics in its place"):
        check_loggers(config)
