"""The export's model card gets the figures of the last evaluation, which follows the export."""

import pytest

from foundry_ext.checkpoints.export import export_checkpoint
from foundry_ext.checkpoints.provenance import provenance_of
from foundry_ext.records.record import read_record
from foundry_ext.training.callbacks.run_record import RunRecord
from tests.training import kit
from tests.training.test_run_files import config


def without_place(card, folder) -> list[str]:
    """Return a card's lines without the folder's name and the digest."""
    return card.read_text().replace(str(folder), "FOLDER").splitlines()[:-1]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_figures_of_the_last_evaluation(world, tmp_path, method):
    kit.run(config(world, tmp_path / "run", method=method, save_interval="1ba"))
    record = read_record(tmp_path / "run/record.json")
    card = (tmp_path / "run/hf/README.md").read_text()
    assert [entry["step"] for entry in record["evaluations"]] == [0, 2, 3]
    before, earlier, last = (f"{e['metrics']['target/loss']:.3f}" for e in record["evaluations"])
    assert f"| nats per token | {before} | {last} | " in card and earlier not in card
    assert "More Information Needed" not in card
    assert kit.run_the_card(tmp_path / "run/hf")["path"] == str(tmp_path / "run/hf")
    assert provenance_of(tmp_path / "run/hf").step == 3
    # A checkpoint of the last step has the same card, and an earlier one its own figures.
    for step in (3, 2):
        export_checkpoint(kit.checkpoint(tmp_path / "run", step), tmp_path / f"{step}")
    theirs = without_place(tmp_path / "run/hf/README.md", tmp_path / "run/hf")
    assert without_place(tmp_path / "3/README.md", tmp_path / "3") == theirs
    other = (tmp_path / "2/README.md").read_text()
    assert f"| nats per token | {before} | {earlier} | " in other and last not in other
    assert "| Steps | 2; the run went on to 3 |" in other


def test_an_export_before_a_failed_evaluation_states_no_figures(world, tmp_path, monkeypatch):
    evaluated = RunRecord.eval_after_all

    def crash(self, state, logger):
        if self.outcome is not None:
            raise kit.Crash
        evaluated(self, state, logger)

    monkeypatch.setattr(RunRecord, "eval_after_all", crash)
    with pytest.raises(kit.Crash):
        kit.run(config(world, tmp_path / "run"))
    card = (tmp_path / "run/hf/README.md").read_text()
    assert "no measurement of learning or forgetting at step 3" in card
    assert "Learning: " not in card and "| Seed | " in card


def test_a_card_edited_during_the_last_evaluation_is_kept(world, tmp_path, monkeypatch, caplog):
    evaluated = RunRecord.eval_after_all

    def edit(self, state, logger):
        if self.outcome is not None:
            (tmp_path / "run/hf/README.md").write_text("Precious.")
        evaluated(self, state, logger)

    monkeypatch.setattr(RunRecord, "eval_after_all", edit)
    kit.run(config(world, tmp_path / "run"))
    assert (tmp_path / "run/hf/README.md").read_text() == "Precious."
    assert "README.md was edited, and is kept" in caplog.text


def test_a_run_without_a_record(world, tmp_path):
    kit.run(config(world, tmp_path / "run", without=("run_record",)))
    card = (tmp_path / "run/hf/README.md").read_text()
    assert "No record of the run was found" in card
    assert "| Steps | 3 |" in card and str(world.base).replace("_", r"\_") in card
