"""The report's sections and picture on whole fronts."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from foundry_ext.comparison.comparison import Comparison, compare_runs
from foundry_ext.comparison.report.document import (
    Block,
    Bullets,
    Paragraph,
    ReportDocument,
    format_markdown,
)
from foundry_ext.comparison.report.fronts import area_sentence, front_blocks, level_sentence
from foundry_ext.comparison.report.plots import plot_tradeoff
from foundry_ext.comparison.report.report import caveats
from foundry_ext.comparison.report.tradeoff import matched_blocks
from foundry_ext.comparison.runs import Loaded, load_runs
from foundry_ext.comparison.tradeoff import pareto_front, points
from foundry_ext.utils.redaction import redact
from tests.comparison import records


def test_points_alone_are_no_fronts_to_compare(comparison: Comparison):
    assert len(texts(front_blocks(comparison))) > len(comparison.fronts.area_pairs)
    runs = [run for group in comparison.chosen.values() for run in group]
    one_rate = compare_runs(Loaded(runs=runs))
    assert one_rate.fronts.area_pairs
    (text,) = texts(front_blocks(one_rate))[-1:]
    assert text.startswith("Each method was run at one learning rate")


def texts(blocks: Sequence[Block]) -> list[str]:
    paragraphs = [block.text for block in blocks if isinstance(block, Paragraph)]
    return [
        *(x for block in blocks if isinstance(block, Bullets) for x in block.texts),
        *paragraphs,
    ]


def test_every_method_s_front_is_drawn_through_the_best_that_was_reached(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between two points of a front, forgetting is the second's: no run is better than both."""
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "step", lambda self, x, y, where, **_: drawn.append((x, y, where)))
    plot_tradeoff(comparison, tmp_path)
    assert len(drawn) == len(comparison.groups)
    for (x, y, where), runs in zip(drawn, comparison.groups.values(), strict=True):
        means = points({"": runs}, comparison.learning, comparison.forgetting)
        front = [point.position for point in pareto_front(means)]
        # From learning 0 to the first point, and from the last one up.
        assert list(zip(x, y, strict=True))[1:-1] == front
        assert list(x) == sorted(x) and list(y) == sorted(y)
        assert where == "pre"  # matplotlib: on (x[i-1], x[i]] the line is at y[i]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of two methods whose seeds all ran at both learning rates of their method."""
    folder = tmp_path_factory.mktemp("whole")
    for seed in (1, 2, 3):
        for method, rates in (("full", (5e-4, 2e-3)), ("lora", (1.25e-3, 1e-2))):
            for rate in rates:
                records.write_run(folder, method, rate, seed, num_items=40)
    return folder


def test_whole_fronts_come_first_and_best_rates_have_a_table(whole: Path, tmp_path: Path, capsys):
    assert main(["compare", str(whole), "--out", str(tmp_path), "--reference", "4"]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "comparison.md").read_text().replace("\\", "")
    compared = compare_runs(load_runs([str(whole)]), reference=4.0)
    (area,), (level,) = compared.fronts.area_pairs, compared.fronts.level_pairs
    for sentence in (area_sentence(compared, area), level_sentence(compared, level)):
        assert sentence in text and sentence in printed
        assert redact(sentence) == sentence
    assert (
        area.is_distinguishable and "4.000 nats per token, LoRA learns more than full: 0." in text
    )
    assert level.is_distinguishable and ", full forgets more than LoRA: 0." in text
    assert "4.000 nats per token, the same for every method (given by --reference)" in text
    assert "with 95 % intervals over seeds and items" in text
    header = "| the point at its best rate | learning rate | learned | forgot |"
    _, *rows = text.partition(header)[2].split("\n\n")[0].strip().splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [["| full", "0.002"], ["| LoRA", "0.01"]]
    assert "| full | 0.002 | 4.7" in rows[0] and rows[0].count("[") == 2
    # A table of a name and two methods: its cells keep intervals on one line, and no sentence.
    first_table = text.partition("averaged over budgets up to")[2].partition("\n\n")[0]
    assert "learned" not in first_table and max(map(len, first_table.splitlines())) < 100
    assert "| seeds with a whole front | 3 (1, 2, 3) | 3 (1, 2, 3) |" in text
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    assert headings[:3] == [
        "Learning against forgetting: whole fronts",
        "Forgetting at matched learning",
        "At each method's best learning rate",
    ]
    data = json.loads((tmp_path / "comparison.json").read_text())["fronts"]
    assert data["reference_forgetting"] == 4 and data["reference_given"]
    assert data["methods"]["full"]["hypervolume"]["mean"] == compared.fronts.areas["full"].mean
    assert data["pairs"][0]["distinguishable"] and data["matched_pairs"][0]["distinguishable"]


def test_what_fronts_do_not_show_is_said(comparison: Comparison):
    """In the sweep, one seed alone ran at every rate, and rsLoRA's grid starts late."""
    blocks = [*map(Paragraph, caveats(comparison)), *front_blocks(comparison)]
    document = ReportDocument("", [*blocks, *matched_blocks(comparison)])
    text = format_markdown(document).replace("\\", "")
    assert "rsLoRA: fewer than 3 seeds were run at every learning rate, so no claim" in text
    assert "In these runs, averaged over budgets of forgetting up to 4.3" in text
    assert ", LoRA and rsLoRA are not ranked by learning: the difference is +0." in text
    assert "but rsLoRA forgot 1.96" in text and "nats per token or more at each of its" in text
    assert "so only an upper bound of its forgetting is known" in text
    fronts = comparison.fronts
    sentences = [area_sentence(comparison, pair) for pair in fronts.area_pairs]
    sentences += [level_sentence(comparison, pair) for pair in fronts.level_pairs]
    assert len(sentences) > 6 and redact("\n".join(sentences)) == "\n".join(sentences)
    pairs = comparison.fronts.area_pairs
    assert all(pair.interval and pair.interval.kind == "items" for pair in pairs)
    extended = replace(comparison.fronts, not_compared=[("A", "B", "3 and 2 rates were run")])
    blocks = front_blocks(replace(comparison, fronts=extended))
    bullets = next(block for block in blocks if isinstance(block, Bullets))
    assert bullets.texts[-1] == "A and B are not compared by area: 3 and 2 rates were run."
    nothing = replace(comparison.fronts, reference=None, areas={})
    last = front_blocks(replace(comparison, fronts=nothing))[-1]
    assert isinstance(last, Paragraph) and "--reference LEVEL sets one" in last.text


def test_runs_without_a_measurement_on_the_way_are_not_matched_along(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "runs")
    assert "Along the runs" in _matched_text(tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("record.json"):
        record = json.loads(path.read_text())
        record["evaluations"] = [record["evaluations"][0], record["evaluations"][-1]]
        path.write_text(json.dumps(record))
    text = _matched_text(tmp_path / "runs")
    assert "Forgetting at matched learning" in text and "Along the runs" not in text


def _matched_text(folder: Path) -> str:
    blocks = matched_blocks(compare_runs(load_runs([str(folder)])))
    return format_markdown(ReportDocument("t", blocks))
