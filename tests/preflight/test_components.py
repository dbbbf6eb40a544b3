"""Names and keys of a YAML's components."""

import copy
from pathlib import Path

import catalogue
import llmfoundry.registry
import pytest
from omegaconf import OmegaConf

from foundry_ext.config.loading import load_config
from foundry_ext.preflight.components import (
    SECTIONS,
    _check_types,
    check_components,
    registered,
)
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get

ROOT = Path(__file__).parents[2]
LOADER = {"name": "packed_finetuning", "dataset": {}, "num_workers": 0}
CONFIG = {
    "model": {
        "name": "smollm2_packed",
        "pretrained_model_name_or_path": "smollm2-135m",
        "pretrained": False,
        "init_device": "cpu",
    },
    "tokenizer": {"name": "anything"},
    "optimizer": {"name": "decoupled_adamw", "lr": 0.1, "param_groups": []},
    "scheduler": {"name": "constant_with_warmup", "t_warmup": "1ba"},
    "callbacks": {
        "guard": {},
        "exact_resume": None,
        "lr_monitor": {},
        "text_samples": {"prompts": ["Once", "Twice"], "max_new_tokens": 2},
    },
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


@pytest.mark.parametrize("path", sorted((ROOT / "yamls").rglob("smollm2*.yaml")), ids=str)
def test_the_shipped_files_are_accepted(path: Path):
    content = OmegaConf.to_container(load_config(path), resolve=True)
    assert isinstance(content, dict)
    check_components(content)


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
        ("eval_loader", 5, "eval_loader: 5; must be a mapping"),
        ("callbacks", ["guard"], "callbacks: ['guard']; must be a mapping"),
        ("callbacks.guard", True, "callbacks.guard: True; must be a mapping"),
        ("callbacks.hf_export", {}, "missing key, callbacks.hf_export.folder; add it"),
        ("callbacks.speed_monitor", {"window": 3}, "speed_monitor.window, did you mean"),
        ("loggers.metrics_file.path", 3, "loggers.metrics_file.path: 3; must be text"),
        ("callbacks.guard.spike_factor", "20x", "spike_factor: '20x'; must be a number"),
        ("callbacks.packed_throughput", {"window_size": "x"}, "'x'; must be an integer"),
        ("model.pretrained", "yes", "model.pretrained: 'yes'; must be true or false"),
        ("code_paths", ["gone.py"], "code_paths, 'gone.py': File gone.py does not exist"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(key, value, message):
    with pytest.raises(UserError) as error:
        check_components(changed(key, value))
    assert message in str(error.value)


def test_a_component_of_the_user_s_own_code_is_known(tmp_path: Path):
    code = tmp_path / "mine.py"
    code.write_text(
        "from composer import Callback\n"
        "from llmfoundry.registry import callbacks\n"
        "@callbacks.register('mine')\n"
        "class Mine(Callback):\n"
        "    def __init__(self, every: int): ...\n"
    )
    with pytest.raises(UserError, match="unknown name, 'mine'"):
        check_components(changed("callbacks.mine", {"every": 3}))
    try:
        config = {**changed("callbacks.mine", {"evry": 3}), "code_paths": [str(code)]}
        with pytest.raises(UserError, match=r"callbacks.mine.evry, did you mean 'every'"):
            check_components(config)
        config["callbacks"]["mine"] = {"every": 3}
        check_components(config)
        code.write_text("1 / 0")
        with pytest.raises(UserError, match=r"mine.py': division by zero; correct the file"):
            check_components(config)
    finally:
        catalogue.REGISTRY.pop(("llmfoundry", "callbacks", "mine"), None)


def test_every_component_of_ours_has_annotations_that_can_be_read():
    ours = {
        (key, name)
        for key, section in SECTIONS.items()
        for registry in section.registries
        for name, component in getattr(llmfoundry.registry, registry).get_all().items()
        if component.__module__.startswith("foundry_ext.")
    }
    assert {key for key, _ in ours} >= {"model", "callbacks", "loggers", "train_loader"}
    for key, name in ours:
        _check_types("x", {}, registered(key, name, SECTIONS[key]))
