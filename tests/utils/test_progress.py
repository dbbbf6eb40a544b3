"""Progress: whole lines in a log, a bar on a terminal, nothing for short work."""

import io
import itertools
import subprocess
import sys

import pytest
import tqdm.std

from foundry_ext.utils.progress import announce, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Notebook(io.StringIO):
    __module__ = "ipykernel.iostream"  # as that of a kernel's sys.stderr, which is no terminal


def shown(monkeypatch, stream: io.StringIO, *, seconds: float, count: int = 40, **more) -> str:
    """Return what is shown of `count` elements that take so long each."""
    clock = itertools.count(start=0.0, step=seconds)
    now = [0.0]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    for _ in progress(range(count), "measuring arc", total=count, unit="packs", **more):
        now[0] = next(clock) + seconds
    return stream.getvalue()


def test_a_log_gets_at_most_a_line_a_minute(monkeypatch):
    lines = shown(monkeypatch, io.StringIO(), seconds=30.0).splitlines()
    assert 15 <= len(lines) <= 20  # in 20 minutes
    assert all("measuring arc" in line and "/40" in line and "<" in line for line in lines)
    assert "20/40 [10:00<10:00" in " ".join(lines)  # time so far, time left
    assert not any("\r" in line for line in lines)


def test_short_work_leaves_no_line(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), seconds=1.0) == ""
    assert shown(monkeypatch, io.StringIO(), seconds=30.0, shown=False) == ""


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_a_terminal_and_a_notebook_get_a_bar(monkeypatch, stream):
    text = shown(monkeypatch, stream(), seconds=2.0)
    assert "\r" in text and "\n" not in text and "20/40" in text


def test_work_that_fails_closes_the_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(ZeroDivisionError):
        for _ in progress(range(2), "x", total=2, unit="packs"):
            raise ZeroDivisionError
    assert list(progress(range(3), "x", total=3, unit="packs")) == [0, 1, 2]


def test_bars_of_libraries_are_quiet_in_a_log():
    code = (
        "from foundry_ext.utils.output import quiet_libraries; quiet_libraries()\n"
        "from datasets import Dataset\n"
        "import datasets.utils.tqdm, tqdm, tqdm.auto\n"
        "for bar in (tqdm.tqdm, tqdm.auto.tqdm, datasets.utils.tqdm):\n"
        "    list(bar(range(1000)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_long_step_is_announced_where_somebody_watches(monkeypatch):
    for stream, text in ((Terminal(), "reading ...\n"), (Notebook(), "reading ...\n")):
        monkeypatch.setattr("sys.stderr", stream)
        announce("reading")
        assert stream.getvalue() == text
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    announce("reading")
    assert log.getvalue() == ""
