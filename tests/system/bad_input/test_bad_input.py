"""Bad input of any kind gives one line that says what is wrong, where, and what to do.

The cases are the table in table.py; `pytest -m more tests/system/bad_input -k NAME` runs some.
"""

import pytest

from tests.system.bad_input import table
from tests.system.bad_input.bench import Bench, environment
from tests.training import kit

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@pytest.fixture
def bench(world, tmp_path, monkeypatch):
    environment(monkeypatch)
    return Bench(tmp_path, world, monkeypatch)


def test_the_run_that_is_spoilt_is_whole(bench):
    ended = bench.train()
    assert ended.code == 0 and not ended.errors
    assert any("checkpoints" in path for path in bench.written())


def test_the_table_is_as_long_as_it_should_be_and_names_differ():
    names = [case.name for case in table.CASES]
    assert len(set(names)) == len(names) >= 90


@pytest.mark.parametrize("case", table.REFUSED, ids=lambda case: case.name)
def test_refused_in_one_line(case, bench):
    """The exit code is not zero, there is one error line, and nothing is written."""
    case.spoil(bench)
    before = bench.written() | {str(bench.folder / "run.yaml")}
    ended = case.start(bench)
    assert ended.code == case.code, ended
    assert len(ended.errors) == 1, ended.err
    assert "Traceback" not in ended.err
    for part in case.says:
        assert part in ended.errors[0], ended.errors[0]
    assert bench.written() <= before


@pytest.mark.parametrize("case", table.ALLOWED, ids=lambda case: case.name)
def test_allowed_and_said(case, bench, caplog):
    """The exit code is zero, and a message says what is odd; `holds` checks the run."""
    case.spoil(bench)
    ended = case.start(bench)
    assert ended.code == 0 and not ended.errors, ended.err
    for part in case.says:
        assert part in caplog.text + ended.err, caplog.text + ended.err
    if case.holds is not None:
        case.holds(bench)


@pytest.mark.parametrize("case", table.ENDED, ids=lambda case: case.name)
def test_a_run_that_ends_early_says_why(case, bench):
    """There is one line, exit code 1, a record with status failed, and no partly written file."""
    case.spoil(bench)
    ended = case.start(bench)
    assert ended.code == 1, ended
    assert len(ended.errors) == 1, ended.err
    for part in case.says:
        assert part in ended.errors[0], ended.errors[0]
    bench.assert_nothing_half_written()
    record = bench.record()
    assert record["status"] == "failed" and record["error"]
