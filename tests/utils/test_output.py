"""Whatever is printed is redacted and printable, and nothing of it is lost."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from foundry_ext.utils import redaction
from foundry_ext.utils.output import (
    SafeStream,
    printable,
    printable_texts,
    redact_output,
    redacted_output,
)
from foundry_ext.utils.redaction import REDACTED, remember_secrets

ROOT = Path(__file__).parents[2]
KEY = ["-----BEGIN PRIVATE KEY-----", *["aB3/" * 16] * 3, "-----END PRIVATE KEY-----"]


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(redaction, "_remembered", set())
    remember_secrets({"api_key": "planted value"})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(*texts: str, is_progress: bool = False, to: io.StringIO | None = None) -> str:
    stream = SafeStream(to or io.StringIO(), is_progress=is_progress)
    for text in texts:
        assert stream.write(text) == len(text)
    stream.flush()
    return stream.getvalue()


def test_a_secret_in_pieces(known):
    assert written("a pla", "nted ", "value", "\n") == f"a {REDACTED}\n"
    assert written("password", "=", "x1", "\n", "b") == f"password={REDACTED}\nb"


def test_a_private_key_line_by_line():
    assert written(*(f"{line}\n" for line in ["a", *KEY, "b"])) == f"a\n{REDACTED}\n\nb\n"
    assert written("\n".join(["a", *KEY, "b"])) == f"a\n{REDACTED}\nb"
    cut = written(*(f"{line}\n" for line in [*KEY[:-1], "an error: it ends here!"]))
    assert cut == f"{REDACTED}\nan error: it ends here!\n"


def test_lines_come_at_once_and_the_rest_by_flush():
    to = io.StringIO()
    stream = SafeStream(to, is_progress=True)
    stream.write("a\nb")
    assert to.getvalue() == "a\n"
    stream.flush()
    assert to.getvalue() == "a\nb"
    stream.write("\r 10 %")
    stream.write("\r 20 %")
    stream.flush()
    assert to.getvalue() == "a\nb\r 10 %\r 20 %"
    stream.write("x" * 10**5)  # a line without an end is not kept back for ever
    assert len(to.getvalue()) > 10**4


HOSTILE = [
    *("\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1b[2J", "\x1b[31m", "\x1b[3;4H", "\x1bc"),
    *("\x9b2J", "\x9d0;title\x9c", "\x1bPq\x1b\\", "\x07", "\x08", "\x00", "\x7f", "\x85"),
    *("\u202e", "\x1b(0", "\x1b", "\x1b[", "\x1b_x\x1b\\", "\x1b#8"),
]


@pytest.mark.parametrize("sequence", HOSTILE)
def test_no_terminal_sequence_passes(sequence: str):
    for left in (printable(f"a{sequence}\tb\n"), written(f"a{sequence}\tb\n")):
        assert left.startswith("a") and left.replace("\t", "").replace("\n", "").isprintable()
    assert printable_texts({f"k{sequence}": [f"v{sequence}", 1]}) == {"k": ["v", 1]}


def test_what_progress_bars_need_passes_on_a_terminal_alone():
    bar = "\x1b[34mx\x1b[0m\x1b[A\x1b[K\r\x1b[2J\x1b]0;y\x07"
    kept = "\x1b[34mx\x1b[0m\x1b[A\x1b[K\r"
    assert written(bar, is_progress=True, to=Terminal()) == kept
    assert written(bar, is_progress=True) == "x\r"
    assert written("a\rb\r\n") == "ab\r\n"  # a record's name cannot go back on its line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_is_an_error(encoding: str):
    content = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(content, encoding=encoding), is_progress=False)
    stream.write("\u00e9 \u2192 \U0001f600 \udcff\n")
    stream.flush()
    shown = content.getvalue().decode(encoding)
    assert shown.endswith("\\udcff\n")
    assert ("\u2192" in shown) == (encoding == "utf-8") and ("\\u2192" in shown) != (
        encoding == "utf-8"
    )


def test_it_is_a_stream_like_the_one_it_wraps(tmp_path: Path, known):
    with open(tmp_path / "a", "w", encoding="utf-8") as file:
        stream = SafeStream(file, is_progress=False)
        assert stream.fileno() == file.fileno() and not stream.isatty()
        assert stream.encoding == "utf-8" and stream.errors == "strict"
        with pytest.raises(TypeError):
            stream.write(b"x")  # as click finds out what a stream takes
        print("1 planted", "value", file=stream)
        stream.writelines(["2 planted value\n"])
        stream.buffer.write(b"3 planted value\n")
        stream.flush()
        os.write(stream.fileno(), b"4\n")
    left = f"1 {REDACTED}\n2 {REDACTED}\n3 {REDACTED}\n4\n"
    assert (tmp_path / "a").read_text(encoding="utf-8") == left


def test_wrapping_twice_is_wrapping_once(capsys, known):
    before = sys.stdout, sys.stderr
    with redacted_output():
        wrapped = sys.stdout
        with redacted_output():
            redact_output()
            assert sys.stdout is wrapped
            print("planted value", end="")
        assert sys.stdout is wrapped
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == REDACTED


def test_a_process_forked_while_a_thread_writes_can_write():
    entered, release = threading.Event(), threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            if text == "slow\n":
                entered.set()
                release.wait()
            return super().write(text)

    stream = SafeStream(Slow(), is_progress=False)
    thread = threading.Thread(target=stream.write, args=("slow\nunfinished",))
    thread.start()
    entered.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child if it hangs
        stream.write("from the child\n")
        os._exit(0 if stream.getvalue() == "from the child\n" else 1)
    _, status = os.waitpid(child, 0)
    release.set()
    thread.join()
    assert status == 0
    stream.flush()
    assert stream.getvalue() == "slow\nunfinished"


PROGRAM = """
import sys, threading, warnings, logging
from foundry_ext.utils.output import redact_output
from foundry_ext.utils.redaction import remember_secrets
redact_output()
remember_secrets({"api_key": "planted value"})
print("partial planted", end=" ")
sys.stdout.write("value")
logging.warning("log planted value")
warnings.warn("warn planted value")
thread = threading.Thread(target=lambda: 1 / len("planted value"[99:]))
thread.start(); thread.join()
raise ValueError("the end: planted value", {"password": "planted2"})
"""


def test_a_process_of_its_own():
    """Its logs, warnings, threads and traceback pass too, and a last line without an end."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"partial {REDACTED}"
    assert "planted" not in done.stderr.replace('"planted value"[99:]', "") and done.returncode == 1
    for said in ("log", "warn", "ZeroDivisionError", "the end:"):
        assert said in done.stderr
    assert done.stderr.rstrip().endswith(f"{{'password': '{REDACTED}'}})")
