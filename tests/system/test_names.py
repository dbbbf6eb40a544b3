"""Names that YAMLs, scripts and W&B pages hold have not changed; see yesterday/names.json."""

import pkgutil
from importlib.metadata import entry_points

import pytest

from foundry_ext.training.loggers import wandb_metrics
from tests.system.names import NAMES, gone, options


@pytest.mark.parametrize("group", NAMES["entry_points"])
def test_entry_points_keep_their_names(group: str):
    assert gone("entry_points", entry_points(group=group).names, group) == set()


@pytest.mark.parametrize("name", NAMES["functions"])
def test_functions_that_yamls_name_can_be_imported(name: str):
    assert callable(pkgutil.resolve_name(name))


def test_wandb_keeps_its_keys():
    assert gone("wandb_keys", wandb_metrics.PROMISED_KEYS) == set()
    assert gone("wandb_config", wandb_metrics.PROMISED_CONFIG) == set()


@pytest.mark.parametrize("name", NAMES["commands"])
def test_commands_keep_their_options(name: str, capsys):
    (command,) = entry_points(group="console_scripts", name="foundry-ext")
    with pytest.raises(SystemExit):
        command.load()([name, "--help"])
    assert gone("commands", options(capsys.readouterr().out), name) == set()
