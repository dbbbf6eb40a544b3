"""The output of our commands: no secrets, no terminal sequences from data, no encoding errors.

`redact_output` wraps the process's standard output and error once, so that every line passes,
whoever prints it: our own messages, a library's logs, tracebacks. What other processes print, and
what C code writes to the file descriptors, does not pass here.
"""

import contextlib
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from foundry_ext.utils.redaction import REDACTED, redact
from foundry_ext.utils.secret_shapes import PRIVATE_KEY_END, PRIVATE_KEY_START

# ECMA-48: CSI sequences; OSC, DCS, SOS, PM and APC strings, which a missing end leaves at the end
# of the line; other escapes.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
# Colours, and what progress bars do: one line up, erase the line.
_HARMLESS = re.compile(r"\x1b\[(?:[\d;]*m|A|[012]?K)")
# Control characters but \t, \n and \r; and those that reverse the direction of the text.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LONE_RETURN = re.compile(r"\r(?!\n)")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MOST_PENDING = 2**16  # characters without a line's end
_KEY_LINES = re.compile(r"[\sA-Za-z0-9+/=:,.-]*")


def printable(text: str) -> str:
    r"""Return the text without terminal sequences and control characters.

    Tabs and ends of lines stay. A lone surrogate, which no file can hold, becomes `\udcff`.
    """
    if text.isprintable():
        return text
    text = _CONTROL.sub("", _SEQUENCE.sub("", text))
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def printable_texts(value: Any) -> Any:
    """Return a copy of nested mappings and lists with every text, keys included, `printable`."""
    if isinstance(value, dict):
        return {printable_texts(key): printable_texts(child) for key, child in value.items()}
    if isinstance(value, list):
        return [printable_texts(child) for child in value]
    return printable(value) if isinstance(value, str) else value


class SafeStream:
    """A text stream that passes on complete lines, redacted and printable.

    An unfinished line, such as a progress bar's, is passed on by `flush`. Everything else, such as
    `isatty` and `fileno`, is the wrapped stream's.

    Args:
        stream: the stream to write to.
        is_progress: let carriage returns pass, and on a terminal colours and the cursor's moves
            up, as progress bars need.
    """

    def __init__(self, stream: Any, *, is_progress: bool) -> None:
        self._stream = stream
        self._is_progress = is_progress
        self._pending = ""
        self._inside_key = False
        self._lock = threading.RLock()
        _streams.add(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def buffer(self) -> "_Bytes":
        return _Bytes(self)

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with self._lock:
            self._pending += text
            end = max(self._pending.rfind("\n"), self._pending.rfind("\r")) + 1
            if len(self._pending) - end > _MOST_PENDING:
                end = len(self._pending)
            if end:
                lines, self._pending = self._pending[:end], self._pending[end:]
                self._pass_on(lines)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._lock:
            rest, self._pending = self._pending, ""
            if rest:
                self._pass_on(rest)
            self._stream.flush()

    def close(self) -> None:
        self.flush()
        self._stream.close()

    def _pass_on(self, text: str) -> None:
        text = redact(self._without_key(text))
        if self._is_progress and self._stream.isatty():
            kept = [*_HARMLESS.findall(text), ""]
            parts = zip(_HARMLESS.split(text), kept, strict=True)
            text = "".join(printable(part) + sequence for part, sequence in parts)
        else:
            text = printable(text)
        if not self._is_progress:
            text = _LONE_RETURN.sub("", text)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _without_key(self, text: str) -> str:
        """Remove a private key's lines, which may come one by one."""
        if self._inside_key:
            end = re.search(PRIVATE_KEY_END, text)
            if end is None and _KEY_LINES.fullmatch(text):
                return ""
            self._inside_key, text = False, text[end.end() :] if end else text
        *_, last = [None, *re.finditer(PRIVATE_KEY_START, text)]
        if last is not None and not re.search(PRIVATE_KEY_END, text[last.end() :]):
            self._inside_key = True
            return f"{text[: last.start()]}{REDACTED}\n"
        return text


_streams: "weakref.WeakSet[SafeStream]" = weakref.WeakSet()


def _begin_child() -> None:
    """Make the streams usable in a forked process, such as a data loader's worker.

    A lock that another thread held at the fork is never released there, and an unfinished line is
    the parent's to write.
    """
    for stream in _streams:
        stream._lock, stream._pending = threading.RLock(), ""


os.register_at_fork(after_in_child=_begin_child)


class _Bytes:
    """The binary side of a SafeStream."""

    def __init__(self, stream: SafeStream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream._stream.buffer, name)

    def write(self, content: bytes) -> int:
        self._stream.write(bytes(content).decode("utf-8", "backslashreplace"))
        return len(content)

    def flush(self) -> None:
        self._stream.flush()


def quiet_libraries() -> None:
    """Make the libraries' progress bars write a line a minute, and none before, into a log.

    Also silences a deprecation that only llm-foundry can mend. To be called before tqdm is
    imported, which reads these variables then.
    """
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    if not sys.stderr.isatty():
        for name in ("TQDM_DELAY", "TQDM_MININTERVAL"):
            os.environ.setdefault(name, "60")


def redact_output(*, is_progress: bool = False) -> None:
    """Wrap standard output and error until the process ends; a second call changes nothing.

    Args:
        is_progress: whether standard output has progress bars, as a training run's has; standard
            error always may.
    """
    for name, moves in (("stdout", is_progress), ("stderr", True)):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream, is_progress=moves))


@contextlib.contextmanager
def redacted_output(*, is_progress: bool = False) -> Iterator[None]:
    """Wrap standard output and error, as `redact_output` does, for a command within a process."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    redact_output(is_progress=is_progress)
    try:
        yield
    finally:
        for name, stream in before.items():
            wrapped = getattr(sys, name)
            if wrapped is not stream and isinstance(wrapped, SafeStream):
                wrapped.flush()
                setattr(sys, name, stream)


@contextlib.contextmanager
def redacted_arguments() -> Iterator[None]:
    """Redact `sys.argv`, which W&B and other trackers store with a run."""
    arguments, sys.argv = sys.argv, redact(sys.argv)
    try:
        yield
    finally:
        sys.argv = arguments
