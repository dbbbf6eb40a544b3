"""Choices in the shipped files: any order of overrides, mistakes, and missing files."""

import itertools
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import DictConfig, OmegaConf

from foundry_ext.cli.main import main as cli
from foundry_ext.config.loading import load_config
from foundry_ext.config.run_name import SWEEP_VARIABLES
from foundry_ext.launch.train import main as train
from foundry_ext.sweeps.file import expand, read_sweep
from foundry_ext.sweeps.plan import plan
from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.nested import get
from tests.yamls.combinations import CARDS, FILES, FOLDERS, OWN, ROOT, SIZES

LORA = FOLDERS["finetune"] / "smollm2_lora.yaml"
PRETRAIN = FOLDERS["pretrain"] / "smollm2_lora.yaml"


# --- the order of overrides ----------------------------------------------------------------------


def ours(path: Path, overrides: list[str]) -> dict[str, Any]:
    content = OmegaConf.to_container(load_config(path, overrides), resolve=True)
    return cast(dict[str, Any], content)


@cache
def parsed(path: Path) -> DictConfig:
    return cast(DictConfig, OmegaConf.load(path))


def stock(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of `llmfoundry train`, as our loaders and callbacks read them."""
    content = OmegaConf.merge(parsed(path), OmegaConf.from_cli(overrides))
    return run_settings(cast(dict[str, Any], OmegaConf.to_container(content, resolve=True)))


ORDERS = {  # overrides, those in one text in this order, and what must come of them
    "rows of another data set": (
        LORA,
        ["train_loader.dataset.split=train[:64]", "variables.data=gsm8k", "variables.size=1.7b"],
        {
            "train_loader.dataset.hf_name": "openai/gsm8k",
            "train_loader.dataset.split": "train[:64]",
            "train_loader.dataset.hf_kwargs": {"name": "main"},
            "train_loader.dataset.preprocessing_fn": "foundry_ext.data.prompts:gsm8k",
            "train_loader.dataset.holdout.by": "question",
            "eval_loader.dataset.split": "train",
            "model.pretrained_model_name_or_path": "HuggingFaceTB/SmolLM2-1.7B",
            "global_train_batch_size": 1,
            "run_name": "smollm2-1.7b_gsm8k_lora",
        },
    ),
    "a file of rows": (
        LORA,
        [
            "train_loader.dataset.hf_name=rows.jsonl",
            "eval_loader.dataset.hf_name=other.jsonl",
            "variables.data=magicoder",
        ],
        {
            "train_loader.dataset.hf_name": "rows.jsonl",
            "train_loader.dataset.preprocessing_fn": "foundry_ext.data.prompts:magicoder",
            "eval_loader.dataset.hf_name": "other.jsonl",
            "callbacks.forgetting.sets.target.loader.dataset.hf_name": "other.jsonl",
            "callbacks.forgetting.sets.target.loader.dataset.holdout.by": "instruction",
            "train_loader.dataset.max_seq_len": 2048,
        },
    ),
    "sets": (
        LORA,
        [
            "callbacks.forgetting.sets.gsm8k.max_items=5",
            "variables.data=magicoder",
            "callbacks.forgetting.sets.target.max_documents=7",
        ],
        {
            "callbacks.forgetting.sets.gsm8k": None,
            "callbacks.forgetting.sets.target.max_documents": 7,
            "callbacks.forgetting.sets.target.loader.dataset.holdout.by": "instruction",
        },
    ),
    "sets of another data set": (
        LORA,
        [
            "callbacks.forgetting.sets.gsm8k.max_items=5",
            "variables.data=gsm8k variables.size=360m",
            "eval_loader.dataset.holdout.fraction=0.2",
        ],
        {
            "callbacks.forgetting.sets.gsm8k.max_items": 5,
            "callbacks.forgetting.sets.gsm8k.path": "data/tasks/gsm8k.jsonl",
            "callbacks.forgetting.sets.target.loader.dataset.holdout": {
                "by": "question",
                "fraction": 0.2,
                "part": "eval",
            },
            "train_loader.dataset.holdout.fraction": 0.05,
            "eval_loader.dataset.pack_tokens": 8192,
        },
    ),
    "rates": (
        LORA,
        ["variables.learning_rates.middle=7.0e-3", "variables.data=gsm8k", "variables.size=360m"],
        {
            "optimizer.lr": 7.0e-3,
            "variables.learning_rates": {
                "lowest": 1.2e-5,
                "low": 3.9e-5,
                "middle": 7.0e-3,
                "high": 3.9e-4,
                "highest": 1.2e-3,
            },
        },
    ),
    "a rate and a rank": (
        LORA,
        [
            "optimizer.lr=1.0e-3",
            "variables.ranks.r16.alpha=8 variables.rank=r16",
            "variables.data=magicoder",
        ],
        {
            "optimizer.lr": 1.0e-3,
            "model.peft_config.r": 16,
            "model.peft_config.lora_alpha": 8,
            "callbacks.run_record.experiment": "magicoder",
        },
    ),
    "packs": (
        LORA,
        [
            "variables.max_seq_len=512",
            "variables.card=80gb",
            "variables.size=360m variables.data=gsm8k",
        ],
        {
            "train_loader.dataset.max_seq_len": 512,
            "tokenizer.kwargs.model_max_length": 512,
            "train_loader.dataset.pack_tokens": 16384,
            "global_train_batch_size": 1,
        },
    ),
    "own rows": (
        LORA,
        [" ".join(OWN), "variables.data=own", "train_loader.dataset.split=train[:9]"],
        {
            "train_loader.dataset.hf_name": "rows/train",
            "train_loader.dataset.split": "train[:9]",
            "train_loader.dataset.holdout": None,
            "train_loader.dataset.preprocessing_fn": None,
            "eval_loader.dataset.hf_name": "rows/eval",
            "callbacks.forgetting.sets.target.loader.dataset.hf_name": "rows/eval",
            "callbacks.forgetting.sets.arc_challenge": None,
        },
    ),
    "replay": (
        LORA,
        [
            "variables.replay_share=0.2",
            "variables.data=metamathqa-replay",
            "eval_loader.dataset.split=train[:50%]",
        ],
        {
            "train_loader.dataset.hf_name": None,
            "train_loader.dataset.holdout": None,
            "eval_loader.dataset.hf_name": "meta-math/MetaMathQA",
            "eval_loader.dataset.split": "train[:50%]",
        },
    ),
    "pretraining": (
        PRETRAIN,
        [
            "train_loader.dataset.hf_kwargs.revision=abc",
            "variables.data=finemath",
            "variables.card=80gb variables.size=1.7b",
        ],
        {
            "train_loader.dataset.hf_kwargs": {
                "data_files": {"train": "finemath-4plus/train-0000[0-2]-of-00064.parquet"},
                "revision": "abc",
            },
            "train_loader.dataset.holdout": {"by": "url", "fraction": 0.002, "part": "train"},
            "model.activation_checkpointing": None,
            "global_train_batch_size": 16,
        },
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_overrides_have_one_meaning_in_every_order(case: str):
    path, overrides, wanted = ORDERS[case]
    found = [
        load(path, " ".join(order).split())
        for load in (ours, stock)
        for order in itertools.permutations(overrides)
    ]
    assert {key: get(found[0], key) for key in wanted} == wanted
    assert all(one == found[0] for one in found[1:])


def test_a_set_that_copies_the_evaluation_copies_it_as_overridden():
    """An override inside `loader: ${eval_loader}` takes a copy, so it must come last."""
    overrides = [
        "callbacks.forgetting.sets.target.loader.dataset.split=train[:9]",
        "eval_loader.dataset.hf_name=other.jsonl",
        "variables.data=gsm8k",
    ]
    for order in itertools.permutations(overrides):
        config = ours(LORA, list(order))
        dataset = config["callbacks"]["forgetting"]["sets"]["target"]["loader"]["dataset"]
        assert (dataset["hf_name"], dataset["split"]) == ("other.jsonl", "train[:9]")
        assert dataset["holdout"]["by"] == "question"
        assert config["eval_loader"]["dataset"]["split"] == "train"


# --- cards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_card_changes_the_packs_and_not_the_tokens_of_a_step(path: Path):
    variables = ours(path, [])["variables"]
    batches = variables["batches"]
    steps = {"64k": 65_536, "16k": 16_384} if "64k" in batches else {"": 131_072}
    for name, tokens in steps.items():
        for card, size in itertools.product(CARDS, SIZES):
            batch = (batches[name] if name else batches)[card][size]
            assert batch["packs"] * batch["pack_tokens"] == tokens
            assert batch["pack_tokens"] >= variables["max_seq_len"]
    small, large = (ours(path, [f"variables.card={card}"]) for card in CARDS)
    assert small["train_loader"]["dataset"]["pack_tokens"] == 16_384
    assert large["train_loader"]["dataset"]["pack_tokens"] == 65_536
    assert small["global_train_batch_size"] == 4 * large["global_train_batch_size"]


# --- mistakes ------------------------------------------------------------------------------------

NO_FILE = "variables.train_path, 'gone.jsonl', does not exist"
MISTAKES = {
    ("variables.size=360",): "variables.size, '360'.*known: 135m, 360m, 1.7b, did you mean '360m'?",
    ("variables.size=1b", "variables.data=gsm8k"): "variables.size, '1b'.*known: 135m, 360m, 1.7b",
    ("variables.data=gsm8",): "variables.data, 'gsm8'.*metamathqa-replay, own, did you .*'gsm8k'",
    ("variables.card=40gb",): "variables.card, '40gb'.*known: 24gb, 80gb",
    ("variables.measure=everything",): "variables.measure, 'everything'.*target, own, source",
    ("variables.tokens_per_step=1m",): "variables.tokens_per_step, '1m'.*known: 64k, 16k",
    ("variables.rank=r8",): "variables.rank, 'r8'.*known: r16, r64, r256",
    ("variables.learning_rate=2e-4",): "variables.learning_rate, '0.0002'.*known: lowest, low",
    ("variables.dataset=gsm8k",): "no variable 'dataset', did you mean 'datasets'",
    ("variables.data=own",): "variables.data=own needs variables.train_path=FILE.*is null",
    ("variables.data=own", OWN[0]): "variables.eval_path is null",
    ("variables.data=own", "variables.train_path=gone.jsonl", OWN[1]): NO_FILE,
    (OWN[0],): "variables.train_path, 'rows/train', would not be read.* variables.data=own",
    (
        "variables.forgetting_path=a.jsonl",
    ): "variables.forgetting_path, .*set variables.measure=own",
    ("variables.measure=own",): "measure=own needs variables.forgetting_path=FILE.*is null",
    ("variables.measure=own", "variables.forgetting_path=gone.jsonl"): "gone.jsonl', does not",
    ("variables.data=own", OWN[0], "variables.eval_path=rows/train"): "is what train_loader trains",
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_a_wrong_choice_is_one_line_that_names_the_known_ones(overrides: tuple[str, ...]):
    with pytest.raises(UserError, match=MISTAKES[overrides]) as error:
        load_config(LORA, list(overrides))
    assert "\n" not in str(error.value)


def test_every_choice_is_named_in_a_comment():
    for path in FILES:
        text = path.read_text()
        variables = OmegaConf.to_container(OmegaConf.load(path))["variables"]  # pyright: ignore
        for name, table in {"size": "sizes", "data": "datasets", "measure": "sets"}.items():
            (line,) = re.findall(rf"^  {name}: .*# (.*)$", text, flags=re.MULTILINE)
            known = line.partition(":")[0].split(", ")
            assert sorted(known) == sorted(variables[table]), (path, name)


def test_a_key_may_be_written_with_dots_though_a_name_has_one():
    for key in ("variables.sizes.1.7b", "variables.sizes[1.7b]"):
        for order in (1, -1):
            given = [f"{key}.checkpointing.24gb=null", "variables.size=1.7b"][::order]
            config = ours(LORA, given)
            assert "activation_checkpointing" not in config["model"], given
            assert set(config["variables"]["sizes"]) == {"135m", "360m", "1.7b"}


def test_brackets_in_a_reference_are_ordered_like_dots():
    for key in ("sets.target.loader.dataset.split", "sets.target.loader[dataset][split]"):
        given = [f"callbacks.forgetting.{key}=train[:9]", "eval_loader.dataset.hf_name=other.jsonl"]
        loader = ours(LORA, given)["callbacks"]["forgetting"]["sets"]["target"]["loader"]["dataset"]
        assert (loader["split"], loader["hf_name"]) == ("train[:9]", "other.jsonl"), key


def test_a_list_of_the_table_is_overridden_as_a_whole():
    replay = "variables.data=metamathqa-replay"
    with pytest.raises(UserError, match=r"share=0.2: .*override the list as a whole"):
        load_config(LORA, [replay, "train_loader.dataset.datasets[1].share=0.2"])
    mixture = "[{hf_name: a, split: train}, {hf_name: b, split: train, share: 0.2}]"
    config = ours(LORA, [replay, f"train_loader.dataset.datasets={mixture}"])
    assert [source["hf_name"] for source in config["train_loader"]["dataset"]["datasets"]] == [
        "a",
        "b",
    ]


# --- own rows ------------------------------------------------------------------------------------


def test_own_rows_are_measured_without_tasks_and_if_asked_without_the_hub(tmp_path: Path):
    rows = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
    for path in rows.values():
        path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    own = ["variables.data=own", *(f"variables.{k}_path={v}" for k, v in rows.items())]
    config = ours(LORA, own)
    assert list(config["callbacks"]["forgetting"]["sets"]) == ["target", "source"]
    assert config["train_loader"]["dataset"] == {
        "hf_name": str(rows["train"]),
        "split": "train",
        "overlong": "truncate",
        "max_seq_len": 1024,
        "pack_tokens": 16_384,
        "fixed_shape": "auto",
        "shuffle": True,
        "shuffle_seed": 17,
    }
    without = ours(LORA, [*own, "variables.measure=target"])
    assert list(without["callbacks"]["forgetting"]["sets"]) == ["target"]
    assert "fineweb" not in str({**without, "variables": None}), "nothing of the hub but the model"
    assert "HuggingFaceTB" not in str(
        {**ours(LORA, [*own, "variables.model=here", "variables.measure=target"]), "variables": 0}
    )
    pages = [*own, "variables.measure=own", f"variables.forgetting_path={rows['eval']}"]
    for path, override in itertools.product((LORA, PRETRAIN), ([], pages)):
        run = {**ours(path, [*own, *override, "variables.model=here"]), "variables": None}
        sets = run["callbacks"]["forgetting"]["sets"]
        assert list(sets) == ["target", "source"]
        assert ("fineweb" in str(run)) != bool(override), "with pages, nothing of the hub"
        assert run["train_loader"]["dataset"]["hf_name"] == str(rows["train"])
        assert sets["target"]["loader"]["dataset"]["hf_name"] == str(rows["eval"])
        assert not {"holdout", "hf_kwargs"} & run["eval_loader"]["dataset"].keys()
        if override:
            source = sets["source"]["loader"]["dataset"]
            assert (source["hf_name"], source["split"]) == (str(rows["eval"]), "train[:200]")
            assert "hf_kwargs" not in source


def test_without_evaluation_no_file_for_it_is_needed():
    for off in ("eval_loader=null", "callbacks.forgetting=null"):
        given = ["variables.data=own", "variables.measure=own", OWN[0], off]
        needed = "forgetting_path" if off.startswith("eval") else "eval_path"
        with pytest.raises(UserError, match=f"variables.{needed} is null"):
            load_config(LORA, given)
    ours(LORA, ["variables.data=own", OWN[0], "eval_loader=null", "callbacks.forgetting=null"])


def test_a_callback_can_be_switched_off():
    config = ours(LORA, ["callbacks.forgetting=null", "loggers.wandb_metrics=null"])
    assert "forgetting" not in config["callbacks"] and "guard" in config["callbacks"]
    assert list(config["loggers"]) == ["metrics_file"]


# --- names ---------------------------------------------------------------------------------------


def test_a_sweeps_names_are_those_of_the_old_files(monkeypatch: pytest.MonkeyPatch):
    """Finished runs of a sweep must be found under the names with which they were started."""
    monkeypatch.setenv(SWEEP_VARIABLES[0], "abc")
    overrides = ["seed=18", "variables.data=magicoder", "variables.learning_rate=low"]
    name = "smollm2-135m_magicoder_lora-seed_18-learning_rate_low"
    assert load_config(LORA, overrides).run_name == name
    config = load_config(LORA, [*overrides, "variables.size=360m", "variables.card=80gb"])
    assert config.run_name == "smollm2-360m_magicoder_lora-seed_18-card_80gb-learning_rate_low"
    assert config.save_folder == f"outputs/{config.run_name}/checkpoints"


# --- files that are gone -------------------------------------------------------------------------

GONE = {
    "yamls/finetune/smollm2-360m_magicoder_dora.yaml": (
        "composer train.py yamls/smollm2_dora.yaml variables.size=360m variables.data=magicoder"
    ),
    "yamls/pretrain/smollm2-1.7b_python-edu_full.yaml": (
        "composer train.py yamls/pretrain/smollm2_full.yaml variables.size=1.7b"
        " variables.data=python-edu"
    ),
    "yamls/finetune/smollm2-135m_metamathqa-replay_lora.yaml": (
        "composer train.py yamls/smollm2_lora.yaml variables.size=135m"
        " variables.data=metamathqa-replay"
    ),
}


@pytest.mark.parametrize("gone", GONE)
def test_a_file_that_is_gone_names_the_command_that_replaces_it(gone: str, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert train("train.py", [gone]) == 2
    assert capsys.readouterr().err == (
        f"train.py: error: {gone}: no such file; it is now: {GONE[gone]}\n"
    )
    for command in ("plan", "inspect", "verify", "config"):
        assert cli([command, gone]) == 2
        said = capsys.readouterr().err
        assert GONE[gone] in said and said.count("\n") == 1, command
    assert cli(["check-fair", gone, "yamls/smollm2_full.yaml"]) == 2
    assert GONE[gone] in capsys.readouterr().err
    # The command that is named works.
    _, _, path, *overrides = GONE[gone].split()
    assert load_config(Path(path), overrides).run_name == Path(gone).stem


def test_a_sweep_of_files_that_are_gone_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    gone = next(iter(GONE))
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "program: train.py\nmethod: grid\ncommand: [composer, '${program}', "
        f"'${{args_no_hyphens}}']\nparameters: {{config: {{values: [{gone}]}}}}\n"
    )
    with pytest.raises(UserError, match=re.escape(GONE[gone])):
        plan(read_sweep(sweep), expand(read_sweep(sweep)))


def test_another_name_in_a_folder_that_is_gone_names_the_files_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"files are now yamls/smollm2_\{full,lora,dora,rslora\}"):
        load_config(Path("yamls/finetune/mine.yaml"), [])
    with pytest.raises(UserError, match=r"no such file, did you mean yamls/pretrain/smollm2_lora"):
        load_config(Path("yamls/pretrain/smollm2_lorra.yaml"), [])
    with pytest.raises(UserError, match=r"no such file$"):
        load_config(Path("runs/finetune/mine.yaml"), [])


# --- foundry-ext config --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        (LORA, ["variables.size=1.7b", "variables.data=metamathqa-replay"]),
        (LORA, ["variables.data=own", *OWN, "optimizer.lr=1e-3"]),
        (PRETRAIN, ["variables.data=openwebmath", "variables.card=80gb"]),
        (ROOT / "yamls/quickstart/lora.yaml", []),
    ],
    ids=["replay", "own", "pretrain", "quickstart"],
)
def test_the_printed_file_is_the_run(path: Path, overrides: list[str], tmp_path: Path, capsys):
    assert cli(["config", str(path), *overrides]) == 0
    printed = capsys.readouterr().out
    assert "${" not in printed and "null" not in printed
    assert printed.startswith(f"# {path} {' '.join(overrides)}".rstrip() + "\n")
    copied = tmp_path / "printed.yaml"
    copied.write_text(printed)
    wanted = ours(path, overrides)
    del wanted["variables"]
    assert ours(copied, []) == wanted
    assert stock(copied, []) == wanted
    # A variable would change nothing any more, so it is refused.
    with pytest.raises(UserError, match="no variable 'learning_rate'"):
        load_config(copied, ["variables.learning_rate=low"])


def test_config_prints_one_run(capsys):
    assert cli(["config", str(LORA), str(PRETRAIN)]) == 2
    assert "pretrain/smollm2_lora.yaml: a second file" in capsys.readouterr().err


def test_config_needs_no_slow_import():
    code = (
        "import sys; from foundry_ext.cli.main import main;"
        f"assert main(['config', {str(LORA)!r}]) == 0;"
        "assert not {'torch', 'composer', 'llmfoundry'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
