"""Names and keys of a YAML's components, and errors that name the section they come from."""

import copy
import importlib

import llmfoundry.registry
import pytest

from foundry_ext.launch.components import (
    SECTIONS,
    check_components,
    errors_name_their_section,
)
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get

train_module = importlib.import_module("llmfoundry.command_utils.train")
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


def raising(error: Exception, module: str):
    def build(**keys):
        raise error

    build.__module__ = module
    return build


@pytest.mark.parametrize(
    ("error", "module", "expected"),
    [
        (UserError("x: 1; give 2"), "foundry_ext.data", (UserError, "train_loader (odd): x: 1; g")),
        (OSError("gone"), "foundry_ext.data", (UserError, "train_loader (odd): gone [OSError]")),
        (ValueError("x"), "other.data", (UserError, "train_loader (odd): x [ValueError]")),
        (ValueError("a bug"), "foundry_ext.data", (ValueError, "a bug")),
    ],
)
def test_errors_of_building_name_their_section(error, module, expected):
    builder = train_module.build_dataloader
    llmfoundry.registry.dataloaders.register("odd", func=raising(error, module))
    kind, text = expected
    with pytest.raises(ValueError) as raised, errors_name_their_section():
        train_module.build_dataloader({"name": "odd"}, None, 1)
    assert type(raised.value) is kind and text in str(raised.value)
    assert train_module.build_dataloader is builder


def test_every_builder_is_there_and_every_section_checked():
    """A renamed builder of llm-foundry would be an AttributeError here, and not a silent change."""
    for section in SECTIONS.values():
        assert callable(getattr(train_module, section.builder))
        for registry in section.registries:
            assert getattr(llmfoundry.registry, registry).get_all()
