"""Fuzzing of the readers of rows, YAMLs, sweeps and records with malformed files.

    python -m tests.system.fuzz.readers [rows | yaml | sweep | records ...] [--minutes 10]

Each reader must accept the file, or raise a `ValueError` or `OSError` that names the file. Commands
print these errors as one line. Anything else is a crash, which is printed with the smallest such
file, and the exit code is 1. Files are valid ones with some bytes or values replaced, or generated.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.system.fuzz.content import mutated_bytes, mutated_json, texts
from tests.system.fuzz.targets import TARGETS, Target

_EXAMPLES_A_ROUND = 1000


@dataclass
class Findings:
    """Counts of a reader's files, and the first file of each kind of crash."""

    files: int = 0
    taken: int = 0
    refused: int = 0
    crashes: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Place in the code -> (error, file)."""


def contents(target: Target) -> st.SearchStrategy[bytes]:
    valid = st.sampled_from(target.valid)
    kinds = [mutated_bytes(valid), texts().map(lambda text: text.encode(errors="surrogatepass"))]
    if target.is_json:
        kinds += [mutated_json(valid)] * 2
    return st.one_of(kinds)


def look(target: Target, content: bytes, folder: Path, findings: Findings) -> None:
    """Give one file to the reader.

    Raises:
        AssertionError: it crashed, or its error does not say where.
    """
    path = folder / target.name
    path.write_bytes(content)
    findings.files += 1
    try:
        target.read(path)
    except (ValueError, OSError) as error:
        findings.refused += 1
        said = " ".join(str(error).split())
        if path.name not in said:
            raise AssertionError(f"names no file: {type(error).__name__}: {said[:200]}") from error
    except (Exception, RecursionError) as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:200]}") from error
    else:
        findings.taken += 1


def place(error: BaseException) -> str:
    """Return the innermost line of this package in an error's traceback."""
    cause = error.__cause__ or error
    frames = traceback.extract_tb(cause.__traceback__)
    own = [frame for frame in frames if "foundry_ext" in frame.filename] or list(frames)
    label = f"{type(cause).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
    return f"{label} (names no file)" if isinstance(cause, ValueError | OSError) else label


def fuzz(target: Target, *, examples: int, number: int, findings: Findings) -> None:
    """Run one round; known crashes are ignored, so that later rounds find other ones."""
    with tempfile.TemporaryDirectory() as folder:

        @seed(number)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(contents(target))
        def once(content: bytes) -> None:
            try:
                look(target, content, Path(folder), findings)
            except AssertionError as error:
                where = place(error)
                known = findings.crashes.get(where)
                if known is None or len(content) < len(known[1]):
                    findings.crashes[where] = str(error), content

        with target.prepared():
            once()


def run(
    target: Target, *, seconds: float, say: Callable[[str], None] = print, first: int = 0
) -> Findings:
    """Run rounds until the time is over."""
    findings, end, number = Findings(), time.monotonic() + seconds, first
    while time.monotonic() < end:
        fuzz(target, examples=_EXAMPLES_A_ROUND, number=number, findings=findings)
        number += 1
    for where, (what, content) in findings.crashes.items():
        say(f"{target.label}: {where}: {what}\n    {content[:600]!r}")
    say(
        f"{target.label}: {findings.files} files, {findings.taken} taken, {findings.refused}"
        f" refused with an error that names the file, {len(findings.crashes)} ways to crash"
    )
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.fuzz.readers")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--minutes", type=float, default=10, help="each (default %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"{min(unknown)}: none of {', '.join(TARGETS)}")
    found = [
        run(TARGETS[name], seconds=60 * arguments.minutes, first=arguments.first)
        for name in arguments.targets or TARGETS
    ]
    print(json.dumps({"crashes": sum(len(one.crashes) for one in found)}))
    return int(any(one.crashes for one in found))


if __name__ == "__main__":
    sys.exit(main())
