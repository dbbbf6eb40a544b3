"""`foundry-ext verify`: passes if all is right, and otherwise says where results diverge."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from foundry_ext.cli.main import main
from foundry_ext.data.dataset import PackedDataset
from foundry_ext.packing.collator import PackCollator
from tests.tiers import one_of
from tests.training import kit


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture
def verify(world, tmp_path, monkeypatch, capsys):
    """Return verify("lora", ...): run in an empty folder; return exit code and output."""
    monkeypatch.chdir(tmp_path)

    def run(method: str, *arguments: str, **overrides) -> tuple[int, str]:
        config = kit.run_config(world, Path("out"), method, callbacks={}, loggers={}, **overrides)
        Path("a.yaml").write_text(OmegaConf.to_yaml(config))
        code = main(["verify", "a.yaml", *arguments])
        return code, capsys.readouterr().out

    return run


def failed(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("  FAIL")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", one_of(kit.METHODS, "dora"))
def test_what_is_right_is_verified_and_leaves_nothing(verify, method: str):
    code, out = verify(method)
    assert code == 0, out
    assert failed(out) == [] and "\nverified: " in out
    for backend in ("flex", "blockwise", "torch_cpu", "sdpa"):
        assert f"no document sees another with {backend}: bitwise" in out
    assert "losses after resuming, bitwise equal: 2 steps" in out
    assert [path.name for path in Path().iterdir()] == ["a.yaml"]


@pytest.mark.filterwarnings("ignore")
def test_a_pack_that_is_too_large_is_cut_and_that_is_said(verify, recwarn):
    code, out = verify("full", "--tokens", "24", "--steps", "2", "--packs", "1")
    assert code == 0, out
    # Of two steps no warm-up is a part.
    assert not [one for one in recwarn if "warmup" in str(one.message)]
    assert "are cut to 24" in out and "packs of 24 tokens (--tokens), not 64" in out


@pytest.mark.filterwarnings("ignore")
def test_documents_that_see_each_other_are_found(verify, monkeypatch):
    """An error is found if the second document's start is missing in cu_seqlens."""
    plain = PackCollator.__call__

    def merged(self, documents):
        pack = plain(self, documents)
        ends = pack["cu_seqlens"]
        if len(ends) > 2:
            pack["cu_seqlens"] = ends[[0, *range(2, len(ends))]]
            pack["max_seqlen"] = 64
        return pack

    monkeypatch.setattr(PackCollator, "__call__", merged)
    code, out = verify("full", "--steps", "2")
    assert code == 1
    lines = "\n".join(failed(out))
    assert "pack 0, document 0 of" in lines and "its end is not in cu_seqlens" in lines
    assert "no document sees another with sdpa: pack 0, document 1: its logits moved" in lines
    assert "packed loss" in lines and "packed gradients" in lines
    assert "losses after resuming" not in lines


@pytest.mark.filterwarnings("ignore")
def test_dropout_that_is_not_resumed_is_found(verify, monkeypatch):
    monkeypatch.setattr(PackedDataset, "restore_rng", lambda self: None)
    code, out = verify("lora")
    assert code == 1
    parted, losses, weights = failed(out)
    assert parted.endswith(": random numbers differ at its first step")
    assert "losses after resuming, bitwise equal: step 3 of 4: " in losses
    assert "final weights" in weights


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_is_trained_twice_is_found(verify, monkeypatch):
    plain = PackedDataset.load_state_dict
    monkeypatch.setattr(
        PackedDataset, "load_state_dict", lambda self, state: plain(self, {**state, "batch": 1})
    )
    code, out = verify("full")
    assert code == 1
    assert "documents differ at its first step" in failed(out)[0]


def test_what_cannot_be_verified(verify, capsys):
    code, _ = verify("full", "--steps", "1")
    assert code == 2
