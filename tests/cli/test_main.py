"""The command itself: its table of subcommands, and one-line errors."""

import importlib
from types import SimpleNamespace

import pytest

from foundry_ext.cli import main as cli
from foundry_ext.utils.errors import UserError


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_arguments_and_a_help(name: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"foundry-ext {name}" in capsys.readouterr().out


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    assert set(cli.COMMANDS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("a: 3 is\nwrong; use 4"), "a: 3 is wrong; use 4"),
        (
            ConnectionError("https://huggingface.co/x: no\nroute " + "y" * 900),
            "hub cannot be reach",
        ),
        (PermissionError(13, "Permission denied", "out"), "Permission denied: 'out'"),
    ],
)
def test_mistakes_are_one_line(error: Exception, message: str, monkeypatch, capsys):
    def run(_):
        raise error

    command = SimpleNamespace(add_arguments=lambda _: None, run=run)
    monkeypatch.setattr(importlib, "import_module", lambda _: command)
    assert cli.main(["inspect"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and len(said) < 500
    monkeypatch.setenv("FOUNDRY_EXT_TRACEBACK", "0")
    with pytest.raises(type(error)):
        cli.main(["inspect", "--traceback"])


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def run(_):
        raise ValueError("a bug")

    command = SimpleNamespace(add_arguments=lambda _: None, run=run)
    monkeypatch.setattr(importlib, "import_module", lambda _: command)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["inspect"])
