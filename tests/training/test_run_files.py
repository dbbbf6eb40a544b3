"""A start touches nothing of an earlier run before its own first step has ended.

Starts that fail, of many kinds, leave every byte and time of what was there; starts that may go on
change only files of their own run.
"""

import errno
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from foundry_ext.config.outputs import find_name_fault
from foundry_ext.config.run_name import SWEEP_VARIABLES
from foundry_ext.launch.train import main
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.records.record import read_record, write_record
from foundry_ext.training.loggers.metrics_file import read_metrics
from foundry_ext.utils.errors import UserError
from tests.training import kit

WRITERS = ("run_record", "forgetting", "hf_export", "metrics_file")


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("ep*")}


def config(
    world, folder: Path, method: str = "full", *, without: tuple[str, ...] = (), **overrides: Any
):
    """Return a run that writes every kind of file; `without` leaves out some of their writers."""
    evaluated = kit.loader_config(world.eval_rows, eval_packs=1)
    target = {"role": "learning", "type": "documents", "loader": evaluated}
    callbacks = {
        "spy": {},
        "run_record": {"path": f"{folder}/record.json", "experiment": "starts"},
        "forgetting": {"items": f"{folder}/items.jsonl", "sets": {"target": target}},
        "exact_resume": {},
        "hf_export": {"folder": f"{folder}/hf"},
        **overrides.pop("callbacks", {}),
    }
    loggers = {"inmemory": {}, "metrics_file": {"path": f"{folder}/metrics.jsonl"}}
    return kit.run_config(
        world,
        folder,
        method,
        **{
            "callbacks": {k: v for k, v in callbacks.items() if k not in without},
            "loggers": {k: v for k, v in loggers.items() if k not in without},
            "eval_loader": evaluated,
            "eval_interval": "2ba",
            "eval_first": True,
            "log_config": True,
            "max_duration": "3ba",
            "autoresume": True,
            "save_num_checkpoints_to_keep": 2,
            **overrides,
        },
    )


def snapshot(folder: Path) -> dict[Path, Any]:
    """Return content, link and times of all that is in the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_file():
            content = os.readlink(path) if path.is_symlink() else path.read_bytes()
            found[path] = content, path.lstat().st_mtime_ns, path.lstat().st_ino
    return found


def assert_kept(before: dict[Path, Any], folder: Path) -> None:
    """Check that all that was there is there still, to the byte and the nanosecond."""
    after = snapshot(folder)
    assert [path for path in before if after.get(path) != before[path]] == []


def refused(given) -> str:
    """Return the line of a start that is refused."""
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        kit.run(given)
    caught.value.__traceback__ = None
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def originals(world, tmp_path_factory) -> dict[str, Path]:
    """Return folders of a finished run, of one that crashed after its last checkpoint, and of one
    that crashed before its first.
    """
    folders = {}
    for name, after, save in (("finished", None, 1), ("crashed", 3, 1), ("dead", 2, 3)):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        spy = {"spy": {"crash_after": after}}
        given = config(world, folder, callbacks=spy, save_interval=f"{save}ba")
        if after is None:
            kit.run(given)
        else:
            with pytest.raises(kit.Crash):
                kit.run(given)
    return folders


@pytest.fixture
def earlier(originals, tmp_path):
    """Return earlier(name): a copy of what such a run left, for a test to start in."""

    def get(name: str) -> Path:
        return shutil.copytree(originals[name], tmp_path / "run", symlinks=True)

    return get


# --- starts that fail ----------------------------------------------------------------------------


def _cut_newest(folder: Path) -> None:
    newest = sorted((folder / "checkpoints").glob("ep*"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])


def _forget_link(folder: Path) -> None:
    (folder / "checkpoints/latest-rank0.pt").unlink()


def _lose_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def _users_file(folder: Path) -> None:
    (folder / "hf/my notes.md").write_text("precious")


def _edit_card(folder: Path) -> None:
    with (folder / "hf/README.md").open("a", encoding="utf-8") as card:
        card.write("Precious.\n")


def _link_elsewhere(folder: Path) -> None:
    """Leave no readable checkpoint of the run's own but a link to one."""
    for path in sorted((folder / "checkpoints").glob("ep*")):
        path.rename(folder / path.name)
        path.symlink_to(folder / path.name)


def _link_newest(folder: Path) -> None:
    newest = sorted((folder / "checkpoints").glob("ep*"))[-1]
    newest.rename(folder / "moved.pt")
    newest.symlink_to(folder / "moved.pt")


def _foreign_newest(folder: Path) -> None:
    torch.save([1, 2], sorted((folder / "checkpoints").glob("ep*"))[-1])


FAILING: dict[str, tuple[str, Any, dict[str, Any], tuple[str, ...]]] = {
    # name: (what was there, what happens to it, what the start changes, what is said)
    "autoresume off": ("finished", None, {"autoresume": False}, ("finished after 3", "autoresume")),
    "autoresume off, crashed": ("crashed", None, {"autoresume": False}, ("autoresume: true",)),
    "autoresume off, no record": (
        *("crashed", None, {"autoresume": False, "without": ("run_record",)}),
        ("ep0-ba2-rank0.pt", "metrics.jsonl", "save_overwrite: true"),
    ),
    "autoresume off, Composer's saver": (
        *("finished", None, {"autoresume": False, "without": ("exact_resume",)}),
        ("record.json", "finished after 3"),
    ),
    "no checkpoints left": ("finished", _lose_checkpoints, {}, ("record.json", "are gone")),
    "no checkpoints left, crashed": ("crashed", _lose_checkpoints, {}, ("checkpoints are gone",)),
    "metrics alone": (
        *("finished", _lose_checkpoints, {"without": ("run_record", "forgetting", "hf_export")}),
        ("metrics.jsonl", "is there already"),
    ),
    "another seed": ("crashed", None, {"seed": 18}, ("another seed: 17, now 18",)),
    "another seed, damaged": ("crashed", _cut_newest, {"seed": 18}, ("another seed: 17",)),
    "another seed, no link": ("crashed", _forget_link, {"seed": 18}, ("another seed: 17",)),
    "links alone": ("crashed", _link_elsewhere, {}, ("or those are links",)),
    "another name": ("crashed", None, {"run_name": "b"}, ("run_name: full, now b",)),
    "another name, damaged": ("finished", _cut_newest, {"run_name": "b"}, ("run_name: full",)),
    "other data": (
        *("crashed", _cut_newest, {"train_loader__dataset__pack_tokens": 96}),
        ("pack_tokens: 64, now 96",),
    ),
    "missing data": (
        *("crashed", None, {"train_loader__dataset__hf_name": "none.jsonl"}),
        ("none.jsonl",),
    ),
    "shorter": ("crashed", None, {"max_duration": "1ba"}, ("already past",)),
    "a user's file in the export": ("finished", _users_file, {}, ("my notes.md", "hf_export")),
    "an edited card": ("finished", _edit_card, {}, ("hf/README.md has been edited", "hf_export")),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_start_that_is_refused_changes_nothing(world, earlier, capfd, case):
    kind, spoil, change, said = FAILING[case]
    folder = earlier(kind)
    if spoil is not None:
        spoil(folder)
    before = snapshot(folder)
    line = refused(config(world, folder, **change))
    for part in said:
        assert part in line, line
    assert_kept(before, folder)
    assert "Eval" not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["finished", "crashed", "dead"])
@pytest.mark.parametrize("place", ["evaluation", "first step"])
def test_a_start_that_dies_before_its_first_step_changes_nothing(
    world, earlier, monkeypatch, kind, place
):
    """It has been allowed to begin, and has measured step 0 or what follows a checkpoint."""
    folder = earlier(kind)
    before = snapshot(folder)
    forward = SmolLM2ForCausalLM.forward

    @functools.wraps(forward)  # Composer passes the arguments that it finds in the signature
    def dies(self, *args, **kwargs):
        if self.training or place == "evaluation":
            raise RuntimeError("out of everything")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SmolLM2ForCausalLM, "forward", dies)
    overwrites = {"autoresume": False, "save_overwrite": True} if kind == "finished" else {}
    with pytest.raises(RuntimeError, match="out of everything") as caught:
        kit.run(config(world, folder, **overwrites))
    caught.value.__traceback__ = None
    assert_kept(before, folder)


@pytest.mark.parametrize("key", ["metrics_file", "run_record", "hf_export", "forgetting"])
def test_the_files_of_another_run_are_refused(world, earlier, tmp_path, key):
    """Two runs with other names, but one place among their files."""
    folder = earlier("finished")
    others = tmp_path / "other"
    own = config(world, others, run_name="other")
    own.callbacks.forgetting.items = f"{others}/items.jsonl"
    theirs = config(world, folder)
    if key == "metrics_file":
        own.loggers.metrics_file = theirs.loggers.metrics_file
    else:
        own.callbacks[key] = theirs.callbacks[key]
    if key in ("run_record", "forgetting"):  # which must lie beside one another
        own.callbacks.run_record.path = f"{folder}/{'record' if key == 'run_record' else 'b'}.json"
        own.callbacks.forgetting.items = f"{folder}/{'b' if key == 'run_record' else 'items'}.jsonl"
    before = snapshot(folder)
    line = refused(own)
    assert str(folder) in line and "another run_name" in line
    assert_kept(before, folder)
    # Nor may the other run, when it goes on, be led there later.
    if key == "metrics_file":
        own.loggers.metrics_file.path = f"{others}/metrics.jsonl"
        own.callbacks.spy = {"crash_after": 3}
        with pytest.raises(kit.Crash):
            kit.run(own)
        own.loggers.metrics_file, own.callbacks.spy = theirs.loggers.metrics_file, {}
        assert str(folder) in refused(own)
        assert_kept(before, folder)


@pytest.mark.parametrize("content", ["precious\n", '{"prompt": "a", "response": "b"}\n'])
@pytest.mark.parametrize("key", ["metrics_file", "run_record", "forgetting"])
def test_what_no_run_wrote_is_never_replaced(world, tmp_path, key, content):
    """Not even with save_overwrite, because a path may have been mistyped."""
    given = config(world, tmp_path, autoresume=False, save_overwrite=True)
    mine = tmp_path / "mine"
    mine.write_text(content)
    if key == "metrics_file":
        given.loggers.metrics_file.path = str(mine)
    else:
        given.callbacks[key]["path" if key == "run_record" else "items"] = str(mine)
    assert str(mine) in refused(given)
    assert mine.read_text() == content


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("hf", "checkpoints' folder"),
        ("metrics", "items"),
        ("metrics", "record"),
    ],
)
def test_one_place_for_two_files_is_refused(world, tmp_path, key, other):
    given = config(world, tmp_path)
    if key == "hf":  # the export replaces its whole folder
        given.callbacks.hf_export.folder = str(tmp_path)
    elif other == "items":
        given.callbacks.forgetting.items = given.loggers.metrics_file.path
    else:
        given.loggers.metrics_file.path = given.callbacks.run_record.path
    assert "would overwrite it" in refused(given)


@pytest.mark.parametrize("override", ["autoresume=false", "seed=18", "sed=18", "run_name=../b"])
def test_the_command_refuses_in_one_line(world, earlier, capsys, monkeypatch, override):
    """The record says that this process is running it, as it may in a container started again."""
    for name in SWEEP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = earlier("crashed")
    record = read_record(folder / "record.json")
    write_record(folder / "record.json", {**record, "status": "running", "ended": None})
    assert read_record(folder / "record.json")["pid"] == os.getpid()
    OmegaConf.save(config(world, folder), folder / "run.yaml")
    before = snapshot(folder)
    assert main("train.py", [str(folder / "run.yaml"), override]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("train.py: error: ")]
    assert len(errors) == 1
    assert_kept(before, folder)


# --- starts that go on ---------------------------------------------------------------------------


def test_what_an_earlier_start_left_before_its_first_checkpoint_is_replaced(world, earlier, capfd):
    folder = earlier("dead")
    first = read_record(folder / "record.json")
    assert first["status"] != "finished" and first["checkpoint"] is None
    assert len(read_metrics(folder / "metrics.jsonl")["loss/train/total"]) == 2
    kit.run(config(world, folder))
    said = capfd.readouterr().err
    assert f"replaces {folder}/" in said and "saved no checkpoint" in said
    record = read_record(folder / "record.json")
    assert record["status"] == "finished" and record["started"] > first["started"]
    assert record["checkpoint"].endswith("ep0-ba3-rank0.pt")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["batch"] for line in lines if "loss/train/total" in line]
    assert losses == [0, 1, 2]


def test_evaluations_before_the_first_step_are_kept(originals):
    metrics = read_metrics(originals["finished"] / "metrics.jsonl")
    assert 0 in metrics["metrics/eval/LanguageCrossEntropy"]
    items = (originals["finished"] / "items.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in items} == {0, 2, 3}


@pytest.mark.parametrize("spoil", [None, _cut_newest, _forget_link, _link_newest, _foreign_newest])
def test_a_crashed_run_goes_on(world, earlier, originals, caplog, spoil):
    folder = earlier("crashed")
    content = sorted((folder / "checkpoints").glob("ep*"))[-1].read_bytes()
    if spoil is not None:
        spoil(folder)
    (folder / "checkpoints/partial-results.csv").write_text("precious")
    kit.run(config(world, folder))
    if spoil is _link_newest:
        assert (folder / "moved.pt").read_bytes() == content
        assert "is a link" in caplog.text and "damaged" not in caplog.text
    elif spoil is _foreign_newest:
        assert "holds a list" in caplog.text
    assert (folder / "checkpoints/partial-results.csv").read_text() == "precious"
    ours, theirs = (read_record(x / "record.json") for x in (folder, originals["finished"]))
    assert ours["status"] == "finished"
    assert ours["evaluations"] == theirs["evaluations"]
    assert (folder / "checkpoints/latest-rank0.pt").resolve().name == "ep0-ba3-rank0.pt"
    names = [sorted(p.name for p in (x / "hf").iterdir()) for x in (folder, originals["finished"])]
    assert names[0] == names[1]


def test_a_finished_run_says_so_when_it_is_started_again(world, earlier, capfd):
    folder = earlier("finished")
    before = read_record(folder / "record.json")
    weights = sorted((folder / "checkpoints").glob("ep*"))
    contents = [path.read_bytes() for path in weights]
    kit.run(config(world, folder))
    assert "had already reached max_duration, 3ba" in capfd.readouterr().err
    after = read_record(folder / "record.json")
    assert after["evaluations"] == before["evaluations"] and after["status"] == "finished"
    assert [path.read_bytes() for path in weights] == contents


def test_a_finished_run_keeps_its_checkpoints_when_it_is_started_again(world, tmp_path, capfd):
    """The last checkpoint is of an epoch's last batch, and its name has the epoch."""
    given = config(world, tmp_path / "run", max_duration="1ep", save_interval="1ba")
    kit.run(given)
    before = contents_of(tmp_path / "run/checkpoints")
    assert len(before) >= 2
    kit.run(given)
    assert "had already reached max_duration, 1ep" in capfd.readouterr().err
    assert contents_of(tmp_path / "run/checkpoints") == before


@pytest.mark.parametrize("change", ["folder above", "redacted name"])
def test_a_run_is_known_again(world, earlier, monkeypatch, change):
    """By a path with `..`, and by a record of when a name that looks like a secret was allowed."""
    folder = earlier("crashed")
    if change == "redacted name":
        record = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps({**record, "run_name": "[redacted]"}))
    else:
        (folder / "below").mkdir()
        folder = folder / "below" / ".."
    kit.run(config(world, folder))
    assert read_record(folder / "record.json")["status"] == "finished"


def test_a_name_that_looks_like_a_secret_is_refused():
    assert "looks like a secret" in str(find_name_fault(f"gsk_{'a1B2' * 8}"))


def test_save_overwrite_replaces_and_says_so(world, earlier, capfd):
    folder = earlier("finished")
    given = {"autoresume": False, "save_overwrite": True, "max_duration": "2ba"}
    kit.run(config(world, folder, **given))
    assert "save_overwrite: true allows" in capfd.readouterr().err
    assert read_record(folder / "record.json")["steps"] == 2
    assert list(read_metrics(folder / "metrics.jsonl")["loss/train/total"]) == [0, 1]


def test_a_run_above_another_leaves_its_files_alone(world, earlier, tmp_path):
    """Run B saves in a folder above that of run A, which is saving at the time."""
    folder = earlier("crashed")
    half = folder / "checkpoints/partial-ep0-ba3-rank0.pt"
    half.write_bytes(b"half of it")
    before = snapshot(folder)
    above = {"save_folder": str(tmp_path), "run_name": "above"}
    kit.run(config(world, tmp_path / "above", max_duration="1ba", **above))
    assert_kept(before, folder)


# --- full disks ----------------------------------------------------------------------------------


def test_an_export_that_will_not_fit_is_refused_before_training(world, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)  # pyright: ignore
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refused(config(world, tmp_path))
    assert "hf_export.folder" in line and "GB free" in line
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["safetensors", "OSError"])
def test_a_disk_that_fills_at_the_export_is_one_error(world, tmp_path, monkeypatch, kind):
    def full(*args, **kwargs):
        if kind == "OSError":
            raise OSError(errno.ENOSPC, "No space left on device")
        from safetensors import SafetensorError

        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("foundry_ext.training.callbacks.hf_export.write_folder", full)
    with pytest.raises(OSError) as caught:
        kit.run(config(world, tmp_path))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, f"{tmp_path}/hf")
    assert not any(path.name.startswith(".hf") for path in tmp_path.iterdir())
