"""docs/notebook.py in a kernel, in a folder that `foundry-ext new` wrote: plots and progress."""

import base64
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundry_ext.cli.main import main
from tests.sweeps.kit import enter

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/notebook.py"
# Bars of work that takes no second in this test.
AT_ONCE = "import foundry_ext.utils.progress as p\np._BAR_SECONDS = 0.0\np._Bar.mininterval = 0.0"
SWEEP = {r"      - yamls/smollm2_(dora|rslora)\.yaml\n": "", r"\[low, middle, high\]": "[high]"}


@pytest.fixture
def experiment(tmp_path: Path, tokenizer_folder: Path, make_rows, monkeypatch) -> Path:
    """Make an experiment of two short runs of a tiny model, by the README's own lines."""
    from tests.training import kit

    enter(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(["new", "mine"]) == 0
    folder = tmp_path / "mine"
    model = folder / "model"
    kit.make_world(tmp_path, tokenizer_folder, make_rows).base.rename(model)
    for path in tokenizer_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    pages = [json.dumps({"text": row["response"]}) + "\n" for row in make_rows(20, seed=3)]
    (folder / "data/pages.jsonl").write_text("".join(pages))
    train = (folder / "data/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data/train.jsonl").write_text("".join(train[:60]))
    lines = {"model": "model", "measure": "own", "forgetting_path": "data/pages.jsonl"}
    for path in (folder / "yamls").iterdir():
        text = path.read_text(encoding="utf-8")
        for key, value in {**lines, "max_seq_len": 128, "pack_tokens": 2048}.items():
            text = re.sub(rf"(?m)^  {key}: .*", f"  {key}: {value}", text, count=1)
        text = re.sub("(?m)^precision: .*", "precision: fp32", text)
        path.write_text(text, encoding="utf-8")
    sweep = (folder / "sweep.yaml").read_text(encoding="utf-8")
    for pattern, replacement in SWEEP.items():
        sweep, count = re.subn(pattern, replacement, sweep)
        assert count
    (folder / "sweep.yaml").write_text(sweep, encoding="utf-8")
    return folder


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the handlers of signals: nbclient leaves the default ones, not Composer's."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.mark.more
def test_the_page_runs_with_progress_and_plots(experiment: Path, handlers: None):
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(PAGE)
    for cell in notebook.cells:
        cell.pop("id", None)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(AT_ONCE))
    resources = {"metadata": {"path": str(experiment)}}
    client = NotebookClient(notebook, timeout=400, kernel_name="python3", resources=resources)
    client.execute(env={**os.environ})
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    pictures = [one["data"]["image/png"] for one in outputs if "image/png" in one.get("data", {})]
    assert len(pictures) == 3
    assert all(base64.b64decode(one)[:8] == b"\x89PNG\r\n\x1a\n" for one in pictures)
    said = {
        name: "".join(one["text"] for one in outputs if one.get("name") == name)
        for name in ("stdout", "stderr")
    }
    assert "60 documents" in said["stdout"] and "2 of 2 runs finished" in said["stdout"]
    assert re.search(r"\rmeasuring target: .*\d+/\d+", said["stderr"])
    assert "target/loss" in outputs[-1]["data"]["text/plain"]
    assert (experiment / "report/index.html").is_file()
