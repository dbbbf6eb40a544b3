"""`foundry-ext check-fair`: exit 0 with one line, or 1 and every difference."""

import re
import shlex
from pathlib import Path

import pytest

from foundry_ext.cli.main import main

ROOT = Path(__file__).parents[3]
FAMILY = [str(ROOT / f"yamls/quickstart/{name}.yaml") for name in ("full", "lora", "dora")]
(DURATION,) = re.findall(r"^max_duration: (\S+)", Path(FAMILY[0]).read_text(), re.MULTILINE)


def read(path: str) -> str:
    return Path(path).read_text()


def test_a_fair_family_is_said_to_be_so(capsys):
    assert main(["check-fair", *FAMILY]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("3 runs are equal in data")
    assert "lora (lr 0.005, r 8, scale 2)" in line


def test_differences_are_named(capsys, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text(re.sub(r"max_duration: \S+", "max_duration: 9ba", read(FAMILY[1])))
    assert main(["check-fair", FAMILY[0], str(changed)]) == 1
    out = capsys.readouterr().out
    assert f"  max_duration: {DURATION} in full.yaml; 9ba in changed.yaml\n" in out
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["foundry-ext", "check-fair"] and main(command[1:]) == 0
    # an override holds for all, and so takes the difference away
    assert main(["check-fair", FAMILY[0], str(changed), "max_duration=5ba"]) == 0
    assert main(["check-fair", FAMILY[0], str(changed), "--allow", "max_duration"]) == 0
    assert "allowed to differ: max_duration" in capsys.readouterr().out


def test_files_of_one_name_are_told_apart(capsys, tmp_path):
    other = tmp_path / "full.yaml"
    other.write_text(re.sub(r"max_duration: \S+", "max_duration: 9ba", read(FAMILY[0])))
    assert main(["check-fair", FAMILY[0], str(other)]) == 1
    assert f"{DURATION} in {FAMILY[0]}; 9ba in {other}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([FAMILY[0]], "one file; check-fair compares two or more"),
        ([FAMILY[0], "nowhere.yaml"], "nowhere.yaml: no such file"),
        ([*FAMILY, "sede=1"], "unknown top-level key, 'sede', did you mean 'seed'"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["check-fair", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_secret_is_printed(capsys, tmp_path):
    """Of the YAMLs, the command line or a usage error, wherever in a line it stands."""
    files = []
    for name in ("a", "b"):
        secret = f"planted-{name}-1"
        text = read(FAMILY[0]).replace("\nvariables:", f"\nvariables:\n  hub_token: {secret}", 1)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"{text}\ncode_paths: [{name}.py, {secret}]\n", encoding="utf-8")
    words = ["check-fair", *map(str, files)]
    main(words)
    main([*words, "variables.hub_token=planted-2"])
    main([*words, "modle.api_key=planted-3"])
    main([*words, "https://me:planted-4@host/x"])
    with pytest.raises(SystemExit):
        main([*words, "--password", "planted-5", "--no-such-option"])
    said = "".join(capsys.readouterr())
    assert "planted" not in said and "[redacted]" in said
    assert "code_paths: [a.py, [redacted]] in a.yaml" in said
