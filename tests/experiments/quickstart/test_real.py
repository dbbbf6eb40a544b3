"""`make quickstart REAL=1`: its two runs differ by method only, and it says what they show."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.quickstart import real, story
from foundry_ext.comparison.fairness import differences
from foundry_ext.sweeps.file import expand, read_sweep
from foundry_ext.sweeps.plan import plan
from foundry_ext.utils.nested import get
from tests.comparison.records import write_run

ROOT = Path(__file__).parents[3]


def test_two_runs_differ_by_method_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("yamls", "experiments", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(
        real, "run_sweep_file", lambda content, *_, **__: started.append(content) or []
    )
    real._train()
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(started[0] | {"name": "real"}))
    sweep = read_sweep(path)
    full, lora = plan(sweep, expand(sweep))  # names keys that the YAMLs do not have
    assert not differences({"full": full.config, "lora": lora.config})
    rates = [get(run.config, "optimizer.lr") for run in (full, lora)]
    assert rates == [real.RATES["full"], real.RATES["lora"]]
    assert get(full.config, "model.pretrained_model_name_or_path") == str(real.MODEL)
    assert str(full.record).startswith("outputs/quickstart-real/runs/")


def test_it_says_what_is_shown_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(real, "FORGETTING", "source_loss")
    records = [
        write_run(tmp_path, method, rate, 17) / "record.json"
        for method, rate in (("full", 1e-3), ("lora", 1e-2))
    ]
    text = "\n".join(real.conclusions(records))
    assert "full at 0.001, 80 steps: learning on target (loss) " in text
    assert "forgetting on source (loss)" in text and "[" in text
    assert "which method is better" in text


def test_its_sweep_is_the_quickstarts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert set(real.CONFIGS) <= set(story.read_grid()["parameters"]["config"]["values"])
