"""`foundry-ext parity`: the command, its page and the models that it loads."""

import re

import pytest
import torch

from foundry_ext.cli.main import main
from foundry_ext.preflight.parity import models
from foundry_ext.utils.errors import UserError
from tests.browser import foreign_references
from tests.preflight.parity.kit import run, scaled


@pytest.fixture
def parity_of(pair, monkeypatch, capsys):
    """Return parity_of(*arguments): run the command on the pair; return its code and output."""
    monkeypatch.setattr(models, "load_pair", lambda _: pair)

    def call(*arguments: str) -> tuple[int, str]:
        code = main(["parity", "<b>", "--dtypes", "fp32", "--tokens", "12", *arguments])
        return code, capsys.readouterr().out

    return call


def test_the_command_and_its_page(parity_of, pair, tmp_path):
    code, out = parity_of("--backends", "sdpa", "flash_attn", "--out", str(tmp_path / "out"))
    assert code == 0 and "within rounding: every layer of 1 combination\n" in out
    assert "skipped: flash_attn in fp32: needs a GPU" in out
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page and "<script" not in page
    assert not foreign_references(page)
    assert page.count("<svg") == 2 and "Within rounding" in page
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("index.html", "growth.png", "growth.svg", "parts.png", "parts.svg")
    }
    assert re.findall(r'<td class="lost"', page) == []

    pair.ours.model.layers[1].mlp.register_forward_hook(scaled)
    code, out = parity_of("--backends", "sdpa", "--out", str(tmp_path / "out"))
    assert code == 1 and "first at layer 1, mlp" in out
    assert re.search(r"^layer 1 .*!$", out, re.MULTILINE)
    assert not re.search(r"^layer 0 .*!", out, re.MULTILINE)
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert 'class="lost" title="mlp"' in page or 'class="lost" title="block"' in page


def test_nothing_to_compare_is_no_success(parity_of):
    code, out = parity_of("--backends", "flash_attn")
    assert code == 1 and "nothing was compared" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["136m"], "MODEL: '136m' is neither"),
        (["135m", "--backends", "flsh"], "--backends: 'flsh' is unknown"),
        (["135m", "--backends", "auto"], "--backends: 'auto' is unknown"),
        (["135m", "--tokens", "7"], "--tokens: 7; give at least 8"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["parity", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.more  # imports Composer, which reads checkpoints
def test_a_folder_and_an_adapter(pair, tmp_path, capsys):
    pair.ours.save_pretrained(tmp_path / "model")
    loaded = models.load_pair(str(tmp_path / "model"))
    for name, parameter in pair.ours.named_parameters():
        assert torch.equal(loaded.theirs.get_parameter(name), parameter), name
        assert loaded.ours.get_parameter(name).data_ptr() == (
            loaded.theirs.get_parameter(name).data_ptr()
        )
    assert run(loaded).beyond() == {}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter; merge it first"):
        models.load_pair(str(tmp_path / "adapter"))
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(UserError, match="model cannot be loaded; name another MODEL: "):
        models.load_pair(str(tmp_path / "model"))


def test_a_size_has_random_weights_that_repeat(monkeypatch):
    made = []
    monkeypatch.setattr(models, "random_pair", lambda config: made.append(config.hidden_size))
    for name in ("135m", "SmolLM2-135M", "360m", "1.7b"):
        models.load_pair(name)
    assert made == [576, 576, 960, 2048]
