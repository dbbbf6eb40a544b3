"""Export of Composer checkpoints as folders for stock libraries, and what is refused.

Checkpoints come from Composer's own saver, without training; tests/training exports trained ones.
"""

import json
import re
import shlex

import pytest
import torch
from composer import Trainer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import foundry_ext.checkpoints.export
from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.checkpoints.loading import as_folder
from foundry_ext.checkpoints.next_steps import next_steps
from foundry_ext.cli.main import main
from tests.comparison.records import write_run
from tests.training import kit


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Return saved(method): a model whose adapter has an effect, and Composer's checkpoint."""
    made = {}

    def get(method, **settings):
        key = method, *settings
        if key not in made:
            model = kit.build(world, method=method, **settings)
            kit.randomise_adapter(model)
            path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
            Trainer(model=model, device="cpu", precision="fp32").save_checkpoint(str(path))
            made[key] = model.eval(), path
        return made[key]

    return get


@pytest.fixture
def changed(saved, tmp_path):
    """Return changed(method, change): the checkpoint after `change(its state)`."""

    def write(method, change):
        content = torch.load(saved(method)[1], weights_only=False)
        change(content["state"])
        path = tmp_path / "changed.pt"
        torch.save(content, path)
        return path

    return write


def assert_same_logits(ours, theirs):
    pack = kit.make_pack(kit.make_documents([20]))
    with torch.no_grad():
        logits = ours({key: value for key, value in pack.items() if key != "labels"}).logits
        expected = theirs.eval()(input_ids=pack["input_ids"]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_full_model_loads_in_transformers(world, saved, tmp_path):
    model, path = saved("full")
    out = export_checkpoint(path, tmp_path / "a" / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs) is LlamaForCausalLM and not any(report.values())
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert_same_logits(model, theirs)
    assert (out / "config.json").read_text() == (world.base / "config.json").read_text()
    assert theirs.generation_config.max_new_tokens == 77
    assert not list(tmp_path.rglob("*.partial"))
    assert_same_logits(model, kit.run_the_card(out)["model"])


@pytest.mark.parametrize("whole", [False, True], ids=["adapter alone", "saved with its base"])
@pytest.mark.parametrize("method", kit.ADAPTERS)
def test_an_adapter_loads_in_peft(world, saved, tmp_path, method, whole):
    model, path = saved(method, **({"should_save_peft_only": False} if whole else {}))
    names = torch.load(path, weights_only=False)["state"]["model"]
    assert any("embed_tokens" in name for name in names) == whole
    out = export_checkpoint(path, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.base)
    assert config["use_dora"] == (method == "dora") and config["use_rslora"] == (method == "rslora")
    assert not (out / "model.safetensors").exists()
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), out)
    assert_same_logits(model, theirs)
    ours = {name: value for name, value in model.model.state_dict().items() if "lora_" in name}
    assert any("magnitude" in name for name in ours) == (method == "dora")  # trap 7
    loaded = theirs.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in ours.items())
    # And the head is still tied once the adapter is merged. (Trap 23.)
    merged = theirs.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    given = kit.run_the_card(out)
    assert isinstance(given["model"], PeftModel)
    assert_same_logits(model, given["model"])
    assert len(given["tokens"][0]) > len(given["prompt"].input_ids[0])


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], "all-linear"])
def test_other_targets(world, tmp_path, targets):
    model = kit.build(world, peft_config={**kit.LORA, "target_modules": targets}).eval()
    kit.randomise_adapter(model)
    path = tmp_path / "model.pt"
    Trainer(model=model, device="cpu", precision="fp32").save_checkpoint(str(path))
    out = export_checkpoint(path, tmp_path / "out")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(world.base), out)
    assert_same_logits(model, theirs)


def test_the_tokenizer_comes_along(world, saved, tmp_path):
    out = export_checkpoint(saved("full")[1], tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(out), kit.load_tokenizer(world)
    text = "12 seven birds<|im_end|> because of 3.5<|endoftext|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert not (out / "tokenizer").exists()


# --- refused, with nothing left behind -----------------------------------------------------------


def refused(error, match, checkpoint, out):
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        export_checkpoint(checkpoint, out)
    assert sorted(out.parent.rglob("*")) == before
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_checkpoint(tmp_path):
    refused(FileNotFoundError, "nothing.pt does not exist", tmp_path / "nothing.pt", tmp_path / "o")
    refused(ValueError, "state_dict_type: full", tmp_path, tmp_path / "o")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    refused(ValueError, "not a readable Composer checkpoint", tmp_path / "text.pt", tmp_path / "o")
    torch.save({"model": {}}, tmp_path / "other.pt")
    refused(ValueError, "not the state of a run", tmp_path / "other.pt", tmp_path / "o")
    torch.save({"state": {"model": {}}}, tmp_path / "other.pt")
    refused(
        ValueError,
        "must be a checkpoint of a Hugging Face model",
        tmp_path / "other.pt",
        tmp_path / "o",
    )


def test_a_run_s_folder_is_refused_with_what_is_in_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/adapter_config.json").touch()
    (tmp_path / "checkpoints/latest-rank0.pt").touch()
    both = f"a run's folder; name {tmp_path}/hf or {tmp_path}/checkpoints/latest-rank0.pt"
    refused(ValueError, re.escape(both), tmp_path, tmp_path / "o")
    with pytest.raises(ValueError, match=re.escape(both)), as_folder(tmp_path):
        pass


def test_refuses_a_folder_in_use(saved, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    refused(ValueError, "is not empty", saved("full")[1], out)
    refused(ValueError, "is not empty", saved("full")[1], out / "mine.txt")
    (out / "mine.txt").unlink()
    assert export_checkpoint(saved("full")[1], out) == out  # an empty one will do


@pytest.mark.parametrize("method", ["full", "dora"])
@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_refuses_weights_that_do_not_fit(changed, tmp_path, method, change):
    def spoil(state):
        weights = state["model"]
        name = next(n for n in weights if "layers.1.mlp.up_proj" in n)
        if change == "missing":
            del weights[name]
        elif change == "left over":
            weights[name.replace("layers.1", "layers.7")] = weights[name]
        else:
            weights[name] = weights[name][:, :-1]

    path = changed(method, spoil)
    refused(ValueError, r"layers\.[17]\.mlp\.up_proj", path, tmp_path / "out")


def test_refuses_another_architecture(changed, tmp_path):
    def spoil(state):
        state["integrations"]["huggingface"]["model"]["config"]["content"]["model_type"] = "gpt2"

    refused(
        ValueError,
        "changed.pt must be of a Llama-shaped model, not gpt2",
        changed("full", spoil),
        tmp_path / "out",
    )


def test_leaves_nothing_when_writing_fails(saved, tmp_path, monkeypatch):
    def full_disk(*_):
        (tmp_path / ".out.partial" / "model.safetensors").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(foundry_ext.checkpoints.export, "write_folder", full_disk)
    refused(OSError, "No space", saved("full")[1], tmp_path / "out")


# --- foundry-ext export --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_command_says_what_to_do_next(saved, tmp_path, capsys, method):
    out = tmp_path / "an out"
    assert main(["export", str(saved(method)[1]), str(out)]) == 0
    headline, *lines = capsys.readouterr().out.splitlines()
    assert headline.startswith(f"{out}: ") and ("adapter of" in headline) == (method == "lora")
    steps = [line.split(maxsplit=1) for line in lines]
    given: dict = {}
    exec(dict(steps)["load"], given)
    assert isinstance(given["model"], PeftModel) == (method == "lora")
    commands = [shlex.split(text)[1:] for label, text in steps if label == "next"]
    assert commands[0] == ["eval", str(out), "--sets", "FILE", "--out", f"{out}-eval"]
    assert len(commands) == (2 if method == "lora" else 1)
    assert all(main(command) == 0 for command in commands[1:])  # merge
    merged = capsys.readouterr().out
    assert method == "full" or f"from_pretrained('{out}-merged')" in merged


def test_the_sets_of_the_run_are_named(tmp_path):
    run = write_run(tmp_path, "lora", 1e-3, 17)
    checkpoint = run / "checkpoints/latest-rank0.pt"
    (run / "out").mkdir()
    assert f"--sets {run}/record.json --out" in next_steps(run / "out", checkpoint)
    (run / "record.json").write_text("{")
    assert "--sets FILE --out" in next_steps(run / "out", checkpoint)


def test_the_command(saved, tmp_path, capsys):
    assert main(["export", str(saved("lora")[1]), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(["export", str(saved("lora")[1]), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("foundry-ext: error: ") and error.count("\n") == 1
    assert main(["export", str(tmp_path / "nothing.pt"), str(tmp_path / "other")]) == 2
    assert "does not exist" in capsys.readouterr().err
