"""The experiment's YAMLs: equal but for the method, and a step of one on its own inputs."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from foundry_ext.comparison.fairness import differences
from foundry_ext.config.loading import load_config
from foundry_ext.records.record import read_items, read_record
from tests.experiments.smollm2_135m_gsm8k.test_inputs import benchmarks  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[3]
YAMLS = sorted((ROOT / "yamls/smollm2-135m-gsm8k").glob("*.yaml"))
RATES = ["lowest", "low", "middle", "high", "highest"]


def test_the_files_differ_by_the_method_only():
    assert [path.stem for path in YAMLS] == ["dora", "full", "lora", "rslora"]
    for overrides in ([], ["variables.mixture=replay"], ["variables.slice=2"]):
        configs = {path.stem: load_config(path, overrides) for path in YAMLS}
        resolved = {
            name: OmegaConf.to_container(one, resolve=True) for name, one in configs.items()
        }
        assert differences(resolved) == []
        for config in configs.values():
            assert list(config.variables.learning_rates)[: len(RATES)] == RATES
            assert "4-bit" in YAMLS[0].read_text(), "Q4_1 is said everywhere"


def test_replay_is_none_of_what_is_measured():
    config = load_config(YAMLS[0], ["variables.mixture=replay"])
    replay = config.train_loader.dataset.datasets[1]
    measured = [
        one.loader.dataset.hf_name
        for one in config.callbacks.forgetting.sets.values()
        if "loader" in one
    ]
    assert replay.share == 0.05 and replay.hf_name not in measured


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")
def test_a_step_with_replay(modules, benchmarks, tokenizer_folder, tmp_path, monkeypatch):  # noqa: F811
    from llmfoundry.command_utils import train

    data, prepare = modules["data"], modules["prepare"]
    monkeypatch.chdir(tmp_path)
    folder = prepare.OUTPUTS / "q4_1"
    write_model(folder / "model", tokenizer_folder)
    monkeypatch.setattr(prepare.weights, "make_model", lambda folder: None)
    monkeypatch.setattr(prepare.chat, "generate", answered)
    for name, count in (("ARC_ROWS", 4), ("WINOGRANDE_ROWS", 4), ("EVAL_ROWS", 4)):
        monkeypatch.setattr(data, name, count)
    assert prepare.main([str(benchmarks)]) == 0
    options = ["variables.mixture=replay", "variables.replay_share=0.2", "max_duration=2ba"]
    config = load_config(ROOT / "yamls/smollm2-135m-gsm8k/lora.yaml", options)
    config.callbacks.text_samples.max_new_tokens = 2
    trainer = train(config)
    trainer.close()
    record = read_record("outputs/smollm2-135m-gsm8k/runs/lora/record.json")
    assert record["status"] == "finished"
    first, last = record["evaluations"]
    assert (first["step"], last["step"]) == (0, 2)
    assert set(last["learning"]) == {"target_loss"}
    assert set(last["forgetting"]) == {
        *("chat_loss", "chat_kl", "prose_loss", "prose_kl", "mean_accuracy"),
        *(f"arc_challenge_{kind}" for kind in ("acc", "acc_norm", "logprob")),
        *(f"winogrande_{kind}" for kind in ("acc", "acc_norm", "logprob")),
    }
    assert record["data"]["eval"]["chat"]["documents"] == 36
    items = read_items("outputs/smollm2-135m-gsm8k/runs/lora/items.jsonl")
    texts = {key for item in items for key, value in item.items() if isinstance(value, str)}
    assert texts == {"set", "item"}


def write_model(folder: Path, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def answered(folder: Path, prompts: list[str]) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"It is {i}."}]
        for i, prompt in enumerate(prompts)
    ]
