"""Verdicts on the paper's claims, on runs drawn from a known truth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from foundry_ext.comparison.claims import find_claims
from foundry_ext.comparison.comparison import compare_runs
from foundry_ext.comparison.finding import Finding, Verdict
from foundry_ext.comparison.report.claims import verdict_text
from foundry_ext.comparison.runs import load_runs
from tests.comparison.records import TRUTHS, write_run

SEEDS = (17, 18, 19)
# The paper's world: LoRA learns less, forgets less, and depends more on its rate.
FULL = replace(TRUTHS["full"], peak=1e-3, most=4.9, cost=0.16)
LORA = replace(TRUTHS["lora"], peak=1e-2, most=3.9, cost=0.12)


def claims(folder: Path, full=FULL, lora=LORA, *, seeds=SEEDS, **changes) -> dict[str, Finding]:
    """Return a word of each claim -> the finding on full fine-tuning and LoRA."""
    if not folder.exists() or not any(folder.iterdir()):
        for method, truth in (("full", full), ("lora", lora)):
            for rate in truth.rates:
                for seed in seeds:
                    write_run(folder, method, rate, seed, truth=truth)
    findings = find_claims(compare_runs(load_runs([str(folder)]), **changes))
    words = ("learns less", "forgets less than full fine-tuning, each", "equal learning")
    words += ("shrinks", "by a higher rank", "weight decay", "depends more")
    assert len(findings) == len(words)
    return {word: next(f for f in findings if word in f.claim) for word in words}


def test_the_papers_world_agrees(tmp_path):
    found = claims(tmp_path / "runs", replace(FULL, rates=(1e-4, 1e-3, 1e-2)))
    for word in ("learns less", "forgets less than full fine-tuning, each", "equal learning"):
        assert found[word].verdict is Verdict.AGREES, word
        assert found[word].groups == ("full", "LoRA") and not found[word].needs
        interval = found[word].interval
        assert interval is not None and 0 < interval.low < interval.high


def test_the_opposite_disagrees(tmp_path):
    found = claims(tmp_path / "runs", replace(FULL, most=3.9, cost=0.1), replace(LORA, most=4.9))
    assert found["learns less"].verdict is Verdict.DISAGREES
    assert found["forgets less than full fine-tuning, each"].verdict is Verdict.DISAGREES


def test_equal_methods_cannot_be_told_apart(tmp_path):
    found = claims(tmp_path / "runs", lora=replace(FULL, peft=LORA.peft))
    for word in ("learns less", "forgets less than full fine-tuning, each", "depends more"):
        assert found[word].verdict is Verdict.CANNOT_BE_TOLD, word
        assert found[word].in_general and "it would need" in verdict_text(found[word])


def test_an_upper_bound_does_not_disagree(tmp_path):
    """All of full fine-tuning's front learned more than LoRA's: less forgetting is not shown."""
    found = claims(tmp_path / "runs")["equal learning"]
    assert found.verdict is Verdict.CANNOT_BE_TOLD and "upper bound" in found.detail


def test_two_seeds_tell_nothing_about_methods(tmp_path):
    found = claims(tmp_path / "runs", seeds=SEEDS[:2])["learns less"]
    assert found.verdict is Verdict.CANNOT_BE_TOLD and found.in_these_runs is Verdict.AGREES
    text = verdict_text(found)
    assert "at least 3 seeds of each" in text and "in these runs alone, it agrees" in text


@pytest.mark.parametrize(
    ("most", "verdict"), [(3.9, Verdict.AGREES), (4.6, Verdict.CANNOT_BE_TOLD)]
)
def test_runs_at_matched_rates_decide_on_equal_learning(tmp_path, most, verdict):
    """Full fine-tuning that forgets more but also learned more tells nothing."""
    for method, truth in (("full", FULL), ("lora", LORA)):
        write_run(tmp_path / "grid", method, truth.peak, SEEDS[0], truth=truth)
    for seed in SEEDS:
        for method, truth in (("full", replace(FULL, most=most, cost=0.2)), ("lora", LORA)):
            write_run(tmp_path / "matched", method, truth.peak * 0.99, seed, truth=truth)
    grid, matched = (load_runs([str(tmp_path / name)]) for name in ("grid", "matched"))
    findings = find_claims(compare_runs(grid, matched_runs=matched.runs))
    (untested,) = [each for each in findings if "learns less" in each.claim]
    assert untested.verdict is Verdict.NOT_TESTED and "best learning rate" in untested.needs
    (found,) = [each for each in findings if "equal learning" in each.claim]
    assert found.verdict is verdict and "at rates 0.00099 and 0.0099" in found.detail
    assert found.estimate is not None and found.estimate > 0.5


def test_what_these_runs_do_not_test(tmp_path):
    found = claims(tmp_path / "runs", seeds=SEEDS[:1])
    for word, needed in (
        ("shrinks", "experiments/ranks"),
        ("by a higher rank", "foundry-ext analyse"),
        ("weight decay", "experiments/regularisers"),
    ):
        assert found[word].verdict is Verdict.NOT_TESTED and needed in found[word].needs


def test_a_steeper_peak_depends_more_on_the_rate(tmp_path):
    """Learning falls by most * (1 - exp(-0.2 ln(2)^2)), 9.2 % of it, at twice and half the peak."""
    found = claims(tmp_path / "runs", replace(FULL, most=1.0), replace(LORA, most=4.0))
    dependence = found["depends more"]
    assert dependence.verdict is Verdict.AGREES and dependence.groups == ("LoRA", "full")
    assert dependence.estimate == pytest.approx(0.092 * 3.0, abs=0.05)
    assert "2 times" in dependence.detail


def test_the_rank_of_the_change(tmp_path):
    runs = tmp_path / "runs"
    claims(runs)
    for rank, seed in zip((101.0, 99.0, 100.0), SEEDS, strict=True):
        (folder,) = runs.glob(f"full_0.001_s{seed}")
        (folder / "analysis.json").write_text(json.dumps({"summary": {"median_rank_90": rank}}))
    found = claims(runs)["by a higher rank"]
    assert found.verdict is Verdict.AGREES
    assert found.estimate == pytest.approx(92.0)  # 100 less LoRA's rank of 8
    assert "12 times LoRA's rank of 8" in found.detail


def _write(runs: Path, method: str, truth, *, optimizer=None) -> None:
    for seed in SEEDS:
        written = write_run(runs / f"{truth.most}", method, truth.peak, seed, truth=truth)
        record = json.loads((written / "record.json").read_text())
        record["config"].setdefault("optimizer", {}).update(optimizer or {})
        (written / "record.json").write_text(json.dumps(record))


def test_two_ranks(tmp_path):
    runs = tmp_path / "runs"
    _write(runs, "full", FULL)
    for rank, most in ((16, 3.5), (64, 4.2)):  # sorted as texts, the higher rank comes second
        _write(runs, "lora", replace(LORA, most=most, peft={**LORA.peft, "r": rank}))
    findings = find_claims(compare_runs(load_runs([str(runs)]), allow=["model.peft_config"]))
    (found,) = [each for each in findings if "shrinks" in each.claim]
    assert found.verdict is Verdict.AGREES and found.estimate == pytest.approx(0.7, abs=0.1)
    assert "r64" in found.groups[0] and "r16" in found.groups[1]
    assert found.interval is not None and found.estimate is not None
    assert 0 < found.interval.low < found.estimate < found.interval.high


def test_a_regulariser(tmp_path):
    runs = tmp_path / "runs"
    _write(runs, "full", FULL, optimizer={"weight_decay": 0.0})
    _write(runs, "full", replace(FULL, most=4.8), optimizer={"weight_decay": 5e-5})
    _write(runs, "lora", LORA, optimizer={"weight_decay": 0.0})
    findings = find_claims(
        compare_runs(load_runs([str(runs)]), allow=["optimizer.weight_decay", "model"])
    )
    (found,) = [each for each in findings if "weight decay" in each.claim]
    assert found.verdict is Verdict.AGREES and "with weight decay" in found.detail
    (learned,) = [each for each in findings if "learns less" in each.claim]
    assert "5e-05" not in learned.groups[0]  # the paper's full fine-tuning has no regulariser


def test_adapters_alone_test_no_claim(tmp_path):
    for seed in SEEDS:
        write_run(tmp_path, "lora", LORA.peak, seed)
        write_run(tmp_path, "dora", LORA.peak, seed)
    assert find_claims(compare_runs(load_runs([str(tmp_path)]))) == []
