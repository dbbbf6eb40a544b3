"""A short round of fuzzing; `python -m tests.system.fuzz.readers` runs for minutes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="run `make install`")

from tests.system.fuzz import readers
from tests.system.fuzz.readers import Findings, fuzz
from tests.system.fuzz.targets import RECORD, TARGETS, Target

EXAMPLES = {"rows": 20, "tasks": 150, "yaml": 100, "sweep": 200, "records": 100, "items": 60}


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_is_taken_or_refused_by_name(name: str):
    findings = Findings()
    fuzz(TARGETS[name], examples=EXAMPLES[name], number=0, findings=findings)
    assert findings.crashes == {}
    assert findings.refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_for_half_a_minute(name: str):
    assert readers.run(TARGETS[name], seconds=30, first=1).crashes == {}


def test_what_crashes_is_found():
    def read(path):
        if b"9" in path.read_bytes():
            raise TypeError("nine")
        raise ValueError("something")

    findings = Findings()
    target = Target(label="a", name="a.json", valid=[b'{"a": 19}'], read=read)
    fuzz(target, examples=50, number=0, findings=findings)
    assert {where.split(" ")[0] for where in findings.crashes} == {"TypeError", "ValueError"}


NOT_ROWS = ["null\n", ' null\n{"prompt": "a"}\n', '{"prompt": "a", "response": "b"}\n\n[1]\n', "7"]


@pytest.mark.parametrize("content", NOT_ROWS)
def test_rows_that_are_no_objects_do_not_end_the_process(content: str, tmp_path):
    """Such rows do not crash the process; the first two crash pyarrow 19."""
    from foundry_ext.data.sources import load_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rows.jsonl, line [13]: .* does not begin a JSON object"):
        load_rows(str(path), "train")


def of_record(change: Callable[[dict[str, Any]], Any]) -> bytes:
    record = json.loads(RECORD)
    change(record)
    return json.dumps(record).encode()


def null_rank(record: dict[str, Any]) -> None:
    record["config"]["model"]["peft_config"]["r"] = None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("yaml", b'"0"', "run.yaml: a single value"),
        (
            "records",
            of_record(lambda one: one.update(items="a" * 5000)),
            r"json: items: 'aaa.* at most 200 ",
        ),
        ("records", of_record(null_rank), r"record.json: peft_config.r: None"),
    ],
    ids=["quoted number", "long path", "null rank"],
)
def test_what_fuzzing_found(name: str, content: bytes, message: str, tmp_path: Path):
    path = tmp_path / TARGETS[name].name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TARGETS[name].read(path)
