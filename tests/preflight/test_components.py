"""Names and keys of a YAML's components."""

import copy

import pytest

from foundry_ext.preflight.components import check_components
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get

LOADER = {"name": "packed_finetuning", "dataset": {}, "num_workers": 0}
CONFIG = {
    "model": {"name": "smollm2_packed", "pretrained": False, "init_device": "cpu"},
    "tokenizer": {"name": "anything"},
    "optimizer": {"name": "decoupled_adamw", "lr": 0.1, "param_groups": []},
    "scheduler": {"name": "constant_with_warmup", "t_warmup": "1ba"},
    "callbacks": {"guard": {}, "exact_resume": None, "lr_monitor": {}},
    "loggers": {"metrics_file": {"path": "m"}},
    "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1}},
    "train_loader": LOADER,
    "eval_loader": [{"label": "a", **LOADER}],
}


def changed(key: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    above, _, last = key.rpartition(".")
    (get(config, above) if above else config)[last] = value
    return config


def test_a_run_is_accepted():
    check_components(CONFIG)
    check_components(changed("eval_loader", LOADER))
    check_components(changed("callbacks", None))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.name", "smollm2_pakced", "model (smollm2_pakced): unknown name, 'smollm2_pakced',"
         " did you mean 'smollm2_packed'? known: "),
        ("model.pretraind", 1, "unknown key, model.pretraind, did you mean 'pretrained'?"),
        ("optimizer.lrr", 1, "optimizer: unknown key, optimizer.lrr, did you mean 'lr'?"),
        ("optimizer", {"lr": 1}, "optimizer: missing key, 'name'; add it"),
        ("scheduler.x", 1, "unknown key, scheduler.x; remove or correct it"),
        ("callbacks.gaurd", {}, "callbacks.gaurd: unknown name, 'gaurd', did you mean 'guard'?"),
        ("callbacks.guard.spike", 2, "callbacks.guard.spike, did you mean 'spike_factor'?"),
        ("callbacks.exact_resume", {"train_config": 1}, "unknown key, callbacks.exact_resume.tr"),
        ("loggers.metrics_file.paht", "x", "loggers.metrics_file.paht, did you mean 'path'?"),
        ("train_loader.tokenizer", 1, "unknown key, train_loader.tokenizer; remove"),
        ("eval_loader", [LOADER], "eval_loader[0]: missing key, 'label'; add it"),
        ("eval_loader", [{"label": "a", **LOADER, "worker": 1}], "eval_loader[0].worker"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(key, value, message):
    with pytest.raises(UserError) as error:
        check_components(changed(key, value))
    assert message in str(error.value)
