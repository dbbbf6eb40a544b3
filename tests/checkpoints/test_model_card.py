"""A card states the figures of its own weights, escapes and redacts names, and knows an edit."""

import copy
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from foundry_ext.adapters.methods import method_of_config
from foundry_ext.checkpoints.model_card import CARD, Weights, may_be_replaced, write_card
from foundry_ext.checkpoints.provenance import EXPORT_MARK, Provenance, provenance_of
from foundry_ext.records.record import read_record, write_record

FINISHED = Path(__file__).parents[1] / "system/yesterday/outputs/rslora-seed_17/record.json"
RSLORA = {"r": 4, "lora_alpha": 8, "use_rslora": True, "lora_dropout": 0.1}
TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"


@pytest.fixture
def record():
    return copy.deepcopy(read_record(FINISHED))


def card(folder, *, record=None, step=None, **weights):
    folder.mkdir(exist_ok=True)
    given = {"place": Path("out/hf"), "method": method_of_config(RSLORA), **weights}
    write_card(folder, Weights(**given), Provenance(record=record, step=step))
    return (folder / CARD).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of every table's row by its first one."""
    lines = (line for line in text.splitlines() if re.match(r"\| [^|]", line))
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first: rest for first, *rest in cells}


def test_method_data_and_software(record, tmp_path):
    found = rows(card(tmp_path, record=record, step=record["steps"], is_adapter=True, base="a/b"))
    assert found["Method"] == ["rsLoRA"]
    assert found["Adapter"] == ["rank 4, alpha 8, scale 4 (alpha / sqrt(rank)), dropout 0.1"]
    assert found["Target modules"][0].startswith(r"q\_proj, k\_proj")
    train = record["data"]["train"]
    assert f"{train['documents']} documents" in found["Data"][0]
    assert found["Steps"] == [str(record["steps"])] and found["Seed"] == [str(record["seed"])]
    assert f"torch {record['environment']['packages']['torch']}" in found["Software"][0]
    assert found["Commit"][0].startswith(record["environment"]["commit"])


# --- figures -------------------------------------------------------------------------------------


def test_figures_are_those_of_the_step_of_the_weights(record, tmp_path):
    start, *_, end = record["evaluations"]
    assert 0 == start["step"] < end["step"]
    found = rows(card(tmp_path, record=record, step=end["step"]))
    shown = [row for name, row in found.items() if name.startswith("Learning: ")]
    assert len(shown) == len(end["learning"]) > 0
    (key,) = (key for key in end["learning"] if key.endswith("_loss"))
    name = key.removesuffix("_loss")
    unit, before, after, change = found[f"Learning: {name} (loss)"]
    assert unit == "nats per token"
    assert before == f"{start['metrics'][f'{name}/loss']:.3f}"
    assert after == f"{end['metrics'][f'{name}/loss']:.3f}"
    assert change.replace("−", "-") == f"{end['learning'][key]:+.3f}"


@pytest.mark.parametrize("step", [None, 1])
def test_figures_of_another_step_are_left_out(record, tmp_path, step):
    assert step not in {entry["step"] for entry in record["evaluations"]}
    text = card(tmp_path, record=record, step=step)
    assert "Learning: " not in text and "Forgetting: " not in text
    assert record["data"]["train"]["name"].replace("_", r"\_") in text


def test_without_a_record(tmp_path):
    text = card(tmp_path, step=3)
    assert "No record of the run was found" in text and rows(text)["Steps"] == ["3"]
    assert "Seed" not in rows(text)


# --- names ---------------------------------------------------------------------------------------


def test_no_name_becomes_markup(record, tmp_path):
    name = "<script>x</script> | `b` | [c](https://d.e)\n# f"
    record["run_name"] = record["data"]["train"]["name"] = record["model"]["name"] = name
    text = card(tmp_path, record=record, step=1, place=Path("a```\n'b"))
    assert "<script" not in text and "https://" not in text
    assert [line for line in text.splitlines() if re.match("#+ f", line)] == []
    assert all(len(row) == 1 for row in rows(text).values())
    code = text.split("```python\n")[1].split("\n```\n")[0]
    compile(code, CARD, "exec")


def test_no_secret_is_written(record, tmp_path):
    record["data"]["train"]["name"] = f"https://user:hunter2hunter2@files.example/{TOKEN}"
    text = card(tmp_path, record=record, step=1, base=TOKEN, place=Path(f"out/{TOKEN}"))
    bare = text.replace("\\", "")
    assert TOKEN not in bare and "hunter2" not in bare and bare.count("[redacted]") >= 4


def test_the_header_names_only_what_the_hub_knows(record, tmp_path, monkeypatch):
    def header(base, data, revision, **weights):
        record["data"]["train"] |= {"name": data, "revision": revision}
        card(tmp_path / "card", record=record, step=1, base=base, **weights)
        return ModelCard.load(tmp_path / "card" / CARD).data

    monkeypatch.chdir(tmp_path)
    found = header("HuggingFaceTB/SmolLM2-135M", "a/b + c/d", "0123", is_adapter=True)
    assert (found.base_model, found.datasets) == ("HuggingFaceTB/SmolLM2-135M", ["a/b", "c/d"])
    assert (found.library_name, found.tags) == ("peft", ["foundry_ext", "rslora"])
    found = header("outputs/a/model", "data/train.jsonl", None)
    assert (found.base_model, found.datasets) == (None, None)
    assert found.library_name == "transformers"
    (tmp_path / "outputs/model").mkdir(parents=True)
    assert header("outputs/model", "data/train.jsonl", "main").datasets is None
    assert header("outputs/model", "a/b", None).to_dict().keys().isdisjoint({"base_model"})


def test_random_base_weights_are_not_offered_for_loading(tmp_path):
    text = card(tmp_path, step=1, base="smollm2-135m", is_adapter=True)
    assert "with random weights" in text and "from_pretrained" not in text


# --- edits ---------------------------------------------------------------------------------------


def test_an_edited_card_is_known(tmp_path):
    text = card(tmp_path, step=1)
    path = tmp_path / CARD
    assert may_be_replaced(path)
    seal = text.splitlines()[-1]
    for edited in (text.replace("rsLoRA", "LoRA"), text + "More.\n", text.replace(seal, ""), ""):
        path.write_text(edited, encoding="utf-8")
        assert not may_be_replaced(path), edited
    ModelCard.from_template(ModelCardData()).save(path)  # as peft does
    assert may_be_replaced(path)


# --- provenance ----------------------------------------------------------------------------------


def test_only_the_run_s_own_export_is_of_its_last_step(record, tmp_path):
    record["config"]["callbacks"]["hf_export"] = {"folder": "run/hf"}
    for name in ("hf", "another"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / EXPORT_MARK).touch()
    write_record(tmp_path / "record.json", record)
    own, another = provenance_of(tmp_path / "hf"), provenance_of(tmp_path / "another")
    assert (own.step, own.real_tokens) == (record["steps"], record["tokens"]["real"])
    assert another.step is None and another.record == record
    write_record(tmp_path / "record.json", {**record, "status": "running"})
    assert provenance_of(tmp_path / "hf").step is None
    (tmp_path / "record.json").write_text("{}")
    assert provenance_of(tmp_path / "hf") == Provenance()
