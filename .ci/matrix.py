"""A table of Pythons and platforms: what each can install of requirements.lock, and its tests.

    python .ci/matrix.py [--install] [--jobs N]

uv resolves the lock for each Python and platform without installing anything. It counts the
packages, and names those without a wheel, which need a compiler. --install also runs `make install`
and `make test` with each Python of this machine, one environment at a time, which is deleted
afterwards.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
UV = Path(sys.executable).with_name("uv")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = {
    "Linux x86_64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS arm64": "aarch64-apple-darwin",
}
NEEDED_GB = 15
NO_WHEEL = re.compile(r"[Bb]ecause ([\w.-]+)==\S+ has no usable wheels")


class Resolution(NamedTuple):
    """The packages that one Python on one platform installs."""

    packages: list[str]
    compiled: list[str]
    """Packages without a wheel there."""


def main() -> int:
    parser = argparse.ArgumentParser(prog=".ci/matrix.py")
    parser.add_argument("--install", action="store_true", help="also install and test")
    parser.add_argument("--jobs", default="auto", help="processes of the tests")
    arguments = parser.parse_args()
    print("| Python | " + " | ".join(PLATFORMS) + " |\n|---|" + "---|" * len(PLATFORMS))
    for python in PYTHONS:
        cells = [describe(resolve(python, platform)) for platform in PLATFORMS.values()]
        print(f"| {python} | " + " | ".join(cells) + " |", flush=True)
    if not arguments.install:
        return 0
    print("\n| Python | `make install` | `make test` |\n|---|---|---|")
    codes = [install_and_test(python, arguments.jobs) for python in PYTHONS]
    return int(any(codes))  # negative after a signal


def describe(resolution: Resolution) -> str:
    compiled = ", ".join(resolution.compiled)
    text = f"{len(resolution.packages)} packages"
    return text + (f"; a compiler for {compiled}" if compiled else "")


def resolve(python: str, platform: str, lock: Path = LOCK) -> Resolution:
    """Resolve the lock for a Python, such as "3.12", and one of uv's platforms.

    Raises:
        SystemExit: a package of the lock is to be had neither as a wheel nor as source.
    """
    compiled: list[str] = []
    while True:
        # An sdist's metadata would have to be built, so a package without a wheel is left out.
        lines = [line for line in entries(lock) if name_of(line) not in compiled]
        output, error = _dry_run(python, platform, lines)
        found = NO_WHEEL.search(" ".join(error.split()))
        if found is None or found[1] in compiled:
            break
        compiled.append(found[1])
    packages = re.findall(r"^ \+ ([\w.-]+)==", output + error, re.MULTILINE)
    if not packages:
        raise SystemExit(f"Python {python} on {platform} cannot install {lock.name}: {error}")
    return Resolution([*packages, *compiled], compiled)


def entries(lock: Path) -> Iterator[str]:
    """Return the lock's packages, each with its hashes."""
    text = re.sub(r"^#.*\n", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return iter(re.findall(r"^\S(?:.*\\\n)*.*$", text, re.MULTILINE))


def name_of(entry: str) -> str:
    return entry.partition("==")[0]


def _dry_run(python: str, platform: str, lines: list[str]) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lock.txt")
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = [str(UV), "pip", "install", "--dry-run", "--no-deps", "--require-hashes"]
        command += ["--only-binary", ":all:", "--target", f"{folder}/site", "-r", str(file)]
        command += ["--python-version", python, "--python-platform", platform]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    return done.stdout, done.stderr


def install_and_test(python: str, jobs: str) -> int:
    """Print a row of the table; return the exit code of the tests, 0 if the Python is not here."""
    interpreter = find_python(python)
    if interpreter is None:
        print(f"| {python} | not here | |", flush=True)
        return 0
    if (free := shutil.disk_usage(ROOT).free / 1e9) < NEEDED_GB:
        raise SystemExit(f"{ROOT}: {free:.0f} GB free, {NEEDED_GB} are needed")
    venv = ROOT / ".venv-matrix"
    shutil.rmtree(venv, ignore_errors=True)  # of a run that was killed, with another Python
    make = ["make", f"VENV={venv.name}", f"PYTHON={interpreter}", f"JOBS={jobs}"]
    try:
        installed, first = run([*make, "install"])
        tested, last = run([*make, "test"]) if installed == 0 else (installed, "")
    finally:
        shutil.rmtree(venv, ignore_errors=True)
    print(f"| {python} | {first if installed else 'passed'} | {last} |", flush=True)
    return tested


def find_python(version: str) -> str | None:
    """Return the path of a Python of this machine: on the PATH, or else one of pyenv's."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *home.glob(f"versions/{version}.*/bin/python")]
    for path in filter(None, found):  # a shim of pyenv may be there without its Python
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    return None


def run(command: list[str]) -> tuple[int, str]:
    """Run a command; return its exit code, and its last line with the time that it took."""
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-20000:] + done.stderr[-5000:])
    last = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2].strip("= ")
    return done.returncode, f"{last} ({(time.monotonic() - start) / 60:.0f} min)"


if __name__ == "__main__":
    sys.exit(main())
