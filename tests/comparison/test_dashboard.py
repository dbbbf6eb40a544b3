"""The dashboard's specification, and the command that prints it; test_dashboard_sent.py sends it.

golden/dashboard.json is `foundry-ext dashboard me/trials --dry-run`.
"""

import json
import sys
from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from foundry_ext.comparison.dashboard import FORGETTING, LEARNING, dashboard
from foundry_ext.config.loading import load_config
from foundry_ext.training.logged_metrics import METRICS, TOKENS, TRADE_OFF, metric_of
from tests.comparison.shown import shown

GOLDEN = Path(__file__).with_name("golden") / "dashboard.json"
ROOT = Path(__file__).parents[2]


def test_the_specification_is_the_golden_one(capsys, monkeypatch):
    """It is printed without the extra."""
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "me/trials", "--dry-run"]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text(encoding="utf-8")


def test_every_metric_with_a_section_has_a_panel_in_it():
    sections = {one["name"]: one["panels"] for one in dashboard("me", "trials")["sections"]}
    for metric in METRICS:
        if metric.section and metric.section != TRADE_OFF:
            titles = [
                panel.get("title", panel.get("table_name")) for panel in sections[metric.section]
            ]
            assert titles.count(metric.key) == 1
    assert len(sections[TRADE_OFF]) == len(LEARNING) * len(FORGETTING)
    assert len(sections["Learning rate"]) == len(LEARNING) + len(FORGETTING)


def test_panels_show_declared_metrics_only():
    keys = {key for place, key in shown(dashboard("me", "trials")) if place != "config"}
    assert TOKENS in keys and len(keys) > 20
    plain = {key for key in keys if not key.startswith("^")}
    assert [key for key in plain if metric_of(key) is None] == []
    assert keys - plain == {
        r"^lr\-.*/group0$",
        *(f"^metrics/.*/{name}$" for name in ("LanguageCrossEntropy", "TokenAccuracy")),
    }


def test_its_sets_are_those_of_the_shipped_yamls():
    config = load_config(ROOT / "yamls/smollm2_lora.yaml", ["variables.data=metamathqa"])
    roles = {name: entry.role for name, entry in config.callbacks.forgetting.sets.items()}
    assert config.callbacks.forgetting.sets.source.kl
    for role, keys in (("learning", LEARNING), ("forgetting", FORGETTING)):
        for key in keys:
            name = key.partition("_")[0]
            assert key == "mean_accuracy" or roles[name] == role


def test_own_sets_take_the_place_of_the_shipped_ones(capsys):
    keys = ["--learning", "problems_loss", "--forgetting", "one_step_loss", "library_kl"]
    assert main(["dashboard", "me/trials", "--dry-run", "--name", "mine", *keys]) == 0
    specification = json.loads(capsys.readouterr().out)
    assert specification["name"] == "mine"
    summary = {key for place, key in shown(specification) if place == "summary"}
    expected = {"learning/problems_loss", "forgetting/one_step_loss", "forgetting/library_kl"}
    assert summary == expected | {"text_samples"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["trials"], ["trials", "ENTITY/PROJECT"]),
        (["me/trials/run"], ["me/trials/run", "ENTITY/PROJECT"]),
        (["me/trials", "--learning", "target"], ["--learning target", "_loss", "_acc_norm"]),
        (["me/trials", "--learning", "source_kl"], ["--learning source_kl", "_loss"]),
        (["me/trials", "--learning", "forgetting/a_loss"], ["--learning forgetting/a_loss"]),
        (["me/trials", "--learning", "_loss"], ["--learning _loss", "a set's name"]),
        (["me/trials", "--forgetting", "accuracy"], ["accuracy", "_kl", "mean_accuracy"]),
    ],
)
def test_mistakes_are_named(arguments, named, capsys):
    assert main(["dashboard", *arguments, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in named) and said.count("\n") == 1


def test_a_key_may_be_written_as_w_and_b_shows_it(capsys):
    short, long = ["--learning", "a_loss"], ["--learning", "learning/a_loss"]
    shown = []
    for keys in (short, long):
        assert main(["dashboard", "me/trials", "--dry-run", *keys]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_without_the_extra_it_names_the_line_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "me/trials"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'foundry-ext[dashboard]'" in said and said.count("\n") == 1
