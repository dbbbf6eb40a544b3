"""The report's files: their content, escaped markup, and how a browser shows them."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape

from foundry_ext.cli.main import main
from foundry_ext.comparison.comparison import Comparison, compare_runs
from foundry_ext.comparison.report.document import (
    Paragraph,
    ReportDocument,
    Table,
    format_markdown,
    inline_svg,
)
from foundry_ext.comparison.report.report import write_report
from foundry_ext.comparison.runs import load_runs
from tests import browser
from tests.comparison import records

PLOTS = ("tradeoff", "curves", "learning_rates", "differences")


@pytest.fixture(scope="module")
def report(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(comparison, folder)
    return folder


class Reader(HTMLParser):
    """Parser that collects unclosed tags, and all names of tags and attributes."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    assert not reader.open
    return reader


def test_every_file_is_written(report: Path):
    expected = {"comparison.md", "comparison.json", "index.html"}
    expected |= {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    assert {path.name for path in report.iterdir()} == expected
    for name in PLOTS:
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_both_texts_say_what_was_found(report: Path, comparison: Comparison):
    text = (report / "comparison.md").read_text().replace("\\", "")
    page = (report / "index.html").read_text().replace("\u00a0", " ")
    for said in (
        *(one.sentence for one in comparison.pairs),
        "full: 0.002 learns most of 0.0005, 0.001, 0.002 (seed 17). It is the highest of the grid",
        "LoRA: 0.01 learns most of 0.005, 0.01, 0.02 (seed 17).",
        "winner's curse",
        "seeds 17, 18, 19",
        "120 items of target",
        "lower right is better",
        "not reached",
        "in runs at the chosen learning rates, full forgets more than LoRA: ",
        "full learned as much before the first evaluation after step 0, so this rests",
        "42,000 (3.8%)",
        "8 / 16",
    ):
        assert said in text, said
        assert escape(said) in page, said
    assert "No claim about these methods" not in text
    assert len(re.findall("<svg", page)) == len(PLOTS)


def test_figures_are_there_as_data(report: Path, comparison: Comparison):
    data = json.loads((report / "comparison.json").read_text())
    assert data["best_learning_rates"]["full"]["edge"] == "highest"
    assert len(data["pairs"]) == 24 and len(data["methods"]) == 16
    first = data["pairs"][0]
    assert (first["first"], first["second"], first["distinguishable"]) == ("full", "LoRA", True)
    assert first["interval"]["low"] < first["difference"] < first["interval"]["high"]


def test_the_same_runs_give_the_same_bytes(report: Path, comparison: Comparison, tmp_path: Path):
    write_report(comparison, tmp_path)
    for path in report.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_page_needs_nothing_else(report: Path):
    page = (report / "index.html").read_text()
    assert browser.foreign_references(page) == []
    reader = read(report / "index.html")
    assert not reader.tags & {"script", "iframe", "object", "link"}
    assert not [name for name in reader.attributes if name.startswith("on")]
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="|url\()#([^")]+)', page):
        assert target in ids


def test_a_seed_that_diverged_at_the_chosen_rate_is_said(tmp_path: Path):
    for seed in (1, 2, 3):
        records.write_run(tmp_path / "runs", "full", 2e-3, seed, num_items=20)
        folder = records.write_run(tmp_path / "runs", "lora", 1e-2, seed, num_items=20)
    record = json.loads((folder / "record.json").read_text())
    record["evaluations"][-1]["forgetting"]["source_loss"] = float("inf")
    (folder / "record.json").write_text(json.dumps(record))
    write_report(compare_runs(load_runs([str(tmp_path / "runs")])), tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "LoRA: 1 of 3 runs at its chosen learning rate diverged (seed 3)" in text
    assert "Diverged: 0.01 (seed 3)." in text
    json.loads((tmp_path / "out" / "comparison.json").read_text())


def test_runs_of_allowed_other_lengths_are_said_and_drawn(tmp_path: Path):
    """With --allow, runs of a group may differ in evaluations: no mean curve, several lengths."""
    for seed in (1, 2):
        folder = records.write_run(tmp_path / "runs", "lora", 1e-2, seed, num_items=20)
    record = json.loads((folder / "record.json").read_text())
    del record["evaluations"][1]
    record["steps"] = 160
    (folder / "record.json").write_text(json.dumps(record))
    compared = compare_runs(load_runs([str(tmp_path / "runs")]), allow=["evaluation", "steps"])
    write_report(compared, tmp_path / "out")
    assert "80 to 160 steps" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize(("start", "overlaps"), [("00:00:30", True), ("00:01:00", False)])
def test_times_of_runs_that_went_on_together_are_not_taken_for_costs(
    tmp_path: Path, start: str, overlaps: bool
):
    for seed, hour, seconds in ((1, "00:00:00", 20.0), (2, start, 40.0)):
        folder = records.write_run(tmp_path / "runs", "lora", 1e-2, seed, num_items=20)
        record = json.loads((folder / "record.json").read_text())
        record["started"] = f"2026-01-01T{hour}.000+00:00"
        record["ended"] = f"2026-01-01T00:0{seed}:00.000+00:00"
        record["time"]["train_seconds"] = seconds
        (folder / "record.json").write_text(json.dumps(record))
    write_report(compare_runs(load_runs([str(tmp_path / "runs")])), tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| 30.0 (20.0 to 40.0) | 8,100 |" in text
    assert ("2 of these 2 runs were under way while another" in text) == overlaps


def test_other_code_and_other_packages_are_said(tmp_path: Path):
    for method, rate in (("full", 2e-3), ("lora", 1e-2)):
        folder = records.write_run(tmp_path / "runs", method, rate, 1, num_items=20)
    runs, out = str(tmp_path / "runs"), tmp_path / "out"
    write_report(compare_runs(load_runs([runs])), out)
    assert "Runs by code: commit 0123456 (2).\n" in (out / "comparison.md").read_text()
    record = json.loads((folder / "record.json").read_text())
    record["environment"] |= {"commit": "f" * 40, "dirty": True, "packages": {"torch": "2.8.0"}}
    (folder / "record.json").write_text(json.dumps(record))
    write_report(compare_runs(load_runs([runs])), out)
    text = (out / "comparison.md").read_text()
    assert "commit fffffff with uncommitted changes (1)" in text
    assert "Packages that differ: torch 2.7.0, 2.8.0. What changed between these" in text


def test_few_seeds_left_out_runs_and_allowed_differences_are_said(tmp_path: Path):
    records.write_run(tmp_path / "runs", "full", 2e-3, 17, num_items=20)
    records.write_run(tmp_path / "runs", "lora", 1e-2, 17, num_items=20, steps=81)
    records.write_run(tmp_path / "runs", "dora", 1e-2, 17, num_items=20, status="running")
    loaded = load_runs([str(tmp_path / "runs")])
    write_report(compare_runs(loaded, allow=["steps"]), tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text().replace("\\", "")
    assert "full and LoRA: fewer than 3 seeds. No claim about these methods in general" in text
    assert "- steps: 80 in full_0.002_s17; 81 in lora_0.01_s17" in text
    assert "- dora_0.01_s17: unfinished" in text
    assert "full and LoRA: one learning rate was run, so it is not chosen and not tuned" in text
    assert "LoRA: only 0.01 was run, so its learning rate is not tuned" in text
    assert "winner" not in text
    assert "seeds needed" not in text and "over learning rates" not in text


def test_one_method_alone_has_a_report(tmp_path: Path):
    for rate in (5e-3, 1e-2):
        records.write_run(tmp_path / "runs", "lora", rate, 17, num_items=20)
    write_report(compare_runs(load_runs([str(tmp_path / "runs")])), tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.startswith("# LoRA: learning and forgetting") and "Findings" not in text
    assert "a report of it, not a comparison" in text and "not tuned" not in text
    assert not (tmp_path / "out" / "differences.png").exists()


EVIL = "<script>alert(1)</script>--><img src=x onerror=alert(2)>|`*_$x^$](javascript:alert(3))"


def test_no_name_becomes_markup(tmp_path: Path):
    summary = {"matrices": 3, "median_rank_90": 5, "total_intruders": 1, "relative_change": 0.1}
    summary |= {"k": 10, "epsilon": 0.5}
    for method, rate in ((EVIL, 2e-3), ("lora", 1e-2)):
        truth = records.TRUTHS["lora"]
        folder = records.write_run(tmp_path / "runs", "lora", rate, 17, truth=truth, num_items=20)
        path = folder / "record.json"
        for file in (path, folder / "items.jsonl"):
            file.write_text(re.sub('"target(?=["_/])(?!_modules)', f'"{EVIL}', file.read_text()))
        text = path.read_text()
        record = json.loads(text)
        record |= {"method": method, "run_name": f"{EVIL}{method}", "experiment": EVIL}
        record["environment"]["device"] = EVIL
        record["data"]["train"]["name"] = EVIL
        path.write_text(json.dumps(record))
        (folder / "analysis.json").write_text(json.dumps({"summary": summary, "line": []}))
    key = f"{EVIL}_loss"
    comparison = compare_runs(load_runs([str(tmp_path / "runs")]), learning=key)
    assert comparison.learning.key == key
    write_report(comparison, tmp_path / "out")
    reader = read(tmp_path / "out" / "index.html")
    assert not reader.tags & {"script", "img"} and "onerror" not in reader.attributes
    for text in ((tmp_path / "out" / f"{name}.svg").read_text() for name in PLOTS):
        assert "<script" not in text and "<img" not in text
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "<script" not in text and "<img" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    # A | in a name splits no row.
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_markdown_keeps_a_text_on_its_line():
    document = ReportDocument("a\n# b", [Paragraph("x\n\n- y"), Table(["n"], [["1\n| 2"]], "c")])
    lines = format_markdown(document).splitlines()
    assert lines[0] == r"# a \# b" and "x - y" in lines and r"| 1 \| 2 |" in lines


def test_inlined_svg_keeps_its_own_ids():
    svg = '<?xml?><!-- c --><svg width="9pt" height="8pt"><g id="a"/><use xlink:href="#a"/></svg>'
    assert inline_svg(svg, "f1-") == '<svg><g id="f1-a"/><use xlink:href="#f1-a"/></svg>'


@browser.needs_browser
def test_a_browser_shows_it(report: Path, tmp_path: Path):
    from PIL import Image

    dom = browser.dom(report / "index.html", tmp_path / "profile")
    assert dom.count("<svg") == len(PLOTS)
    assert "full, LoRA, DoRA and rsLoRA" in dom and "not distinguishable" in dom
    for width in (1280, 390):
        image = tmp_path / f"{width}.png"
        browser.screenshot(report / "index.html", image, tmp_path / "profile", width=width)
        with Image.open(image) as picture:
            assert picture.size[0] == width
            # Not blank, and nothing runs over the edge: the right margin is the page's white.
            colours = picture.convert("L").getextrema()
            assert colours == (colours[0], 255) and colours[0] < 60
            margin = picture.convert("L").crop((width - 8, 0, width, picture.size[1]))
            assert margin.getextrema() == (255, 255)


HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\x9b31m\u202e\udcff\x00\rc"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder of two finished runs and a failed one with hostile texts everywhere."""
    for seed in (17, 18):
        for method in ("lora", "dora"):
            folder = records.write_run(tmp_path / "runs", method, 1e-2, seed, num_items=20)
            text = (folder / "record.json").read_text(encoding="utf-8")
            record = json.loads(text)
            record |= {"run_name": f"{record['run_name']} {HOSTILE}", "experiment": HOSTILE}
            record["data"]["train"]["name"] = record["model"]["name"] = HOSTILE
            (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    failed = shutil.copytree(folder, tmp_path / "runs" / "failed")
    record |= {"status": "failed", "error": f"ValueError: {HOSTILE}", "run_name": f"x {HOSTILE}"}
    (failed / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return tmp_path / "runs"


def test_no_terminal_sequence_of_a_record_is_shown(hostile: Path, tmp_path: Path, capsys):
    assert main(["compare", str(hostile), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.[hmjs]*")]
    assert "x abc" not in said and "x ab" in said and "\\udcff" in said and len(texts) == 7
    ours = str.maketrans("", "", "\n\t\u200b\u00a0")  # the page keeps an interval on one line
    for text in [said, *texts]:
        assert text.translate(ours).isprintable()
        assert "title" not in re.sub("</?title|title=", "", text)
    assert "\\udcff" in texts[0] + texts[1]


def test_a_report_is_utf_8_in_every_locale(hostile: Path, tmp_path: Path):
    for name, variables in {"a": {"LC_ALL": "C", "PYTHONUTF8": "0"}, "b": {}}.items():
        variables |= {"PYTHONCOERCECLOCALE": "0"} if name == "a" else {}
        command = ["-m", "foundry_ext.cli", "compare", str(hostile), "--out", str(tmp_path / name)]
        done = subprocess.run([sys.executable, *command], env={**os.environ, **variables})
        assert done.returncode == 0
    for name in ("comparison.md", "index.html", "comparison.json"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes() and content.decode("utf-8")


def test_a_report_is_complete_or_as_before(comparison: Comparison, tmp_path: Path, monkeypatch):
    def fail(*_: object) -> str:
        raise UnicodeEncodeError("utf-8", "x", 0, 1, "planted")

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "comparison.md").write_text("before", encoding="utf-8")
    monkeypatch.setattr("foundry_ext.comparison.report.report.format_html", fail)
    for name in ("old", "new"):
        with pytest.raises(UnicodeEncodeError):
            write_report(comparison, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "comparison.md"]
    assert (tmp_path / "old" / "comparison.md").read_text(encoding="utf-8") == "before"
