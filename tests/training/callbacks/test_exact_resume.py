"""`exact_resume`: runs that die while saving, are stopped, or find a corrupted newest checkpoint.

(Traps 31, 40, 41.) Processes are killed in tests/system/test_kill.py.
"""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from composer.core import Callback
from llmfoundry import registry
from safetensors.torch import load_file, save_file

from foundry_ext.checkpoints import files as checkpoint_files
from foundry_ext.records.record import read_record
from foundry_ext.records.result_settings import EFFECTS, Effect
from foundry_ext.training import signals
from foundry_ext.utils.errors import UserError
from tests.training import kit
from tests.training.test_resume import assert_ends_like

LAST = 8


class SignalAt(Callback):
    """Callback that sends this process the signal `number` `times` times, inside a batch."""

    def __init__(self, batch: int, number: int, times: int = 1):
        self.batch, self.number, self.times = batch, number, times

    def after_forward(self, state, logger):
        if state.timestamp.batch == self.batch - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
            self.times = 0


registry.callbacks.register("signal_at", func=SignalAt)
EFFECTS["callbacks.signal_at"] = Effect.SAME_BITS


def config(world, reference, folder, method="full", **overrides):
    settings = {**reference.settings, "autoresume": True, "save_num_checkpoints_to_keep": 2}
    settings["callbacks"] = {"spy": {}, "exact_resume": {}, **overrides.pop("callbacks", {})}
    return kit.run_config(world, folder, method, **{**settings, **overrides})


def names(folder):
    files = (path.name for path in (folder / "checkpoints").iterdir())
    return sorted(name for name in files if name != ".lock")


def crash(world, reference, folder, method="full", after=5, **overrides):
    """Run until a crash after `after` batches, which ends the run like a kill."""
    callbacks = {"spy": {"crash_after": after}}
    with pytest.raises(kit.Crash):
        kit.run(config(world, reference, folder, method, callbacks=callbacks, **overrides))


@pytest.fixture(scope="module")
def crashed(world, finished, tmp_path_factory):
    """crashed(folder, method, after): what such a run leaves; it is trained once and copied."""

    @functools.cache
    def made(method, after):
        folder = tmp_path_factory.mktemp("crashed")
        crash(world, finished(method), folder, method, after)
        return folder / "checkpoints"

    def get(folder, method="full", after=5):
        shutil.copytree(made(method, after), folder / "checkpoints", symlinks=True)

    return get


def with_record(folder) -> dict:
    record = {"path": str(folder / "record.json"), "experiment": "x"}
    return {"callbacks": {"run_record": record}, "log_config": True}


# --- saving --------------------------------------------------------------------------------------


def test_keeps_as_many_as_asked_over_several_starts(world, finished, crashed, tmp_path):
    """Stock Composer forgets the checkpoints of earlier processes."""
    reference = finished("full")
    crashed(tmp_path, after=4)
    run = kit.run(config(world, reference, tmp_path))
    # The crash came before the checkpoint of its batch.
    assert_ends_like(run, reference.run, after=3)
    assert names(tmp_path) == ["ep1-ba7-rank0.pt", "ep1-ba8-rank0.pt", "latest-rank0.pt"]


@pytest.mark.parametrize("step", ["write", "sync", "link"])
def test_dying_inside_a_save_leaves_the_one_before(world, finished, tmp_path, monkeypatch, step):
    """A process may end at each step of writing; the next one resumes from an intact checkpoint."""
    reference = finished("full")
    name, at = {"write": ("replace", 5), "sync": ("fsync", 7), "link": ("replace", 6)}[step]
    original, calls = getattr(os, name), []

    def dies(*args):
        calls.append(args)
        if len(calls) == at:
            monkeypatch.setattr(os, name, original)
            monkeypatch.setattr(checkpoint_files.Path, "unlink", lambda *_, **__: None)
            raise kit.Crash  # without cleaning up, like a kill
        return original(*args)

    monkeypatch.setattr(os, name, dies)
    with pytest.raises(kit.Crash):
        kit.run(config(world, reference, tmp_path))
    monkeypatch.undo()
    if step == "write":
        assert "partial-ep0-ba3-rank0.pt" in names(tmp_path)
    link = tmp_path / "checkpoints" / "latest-rank0.pt"
    assert checkpoint_files.damage(link.resolve()) is None
    run = kit.run(config(world, reference, tmp_path))
    assert_ends_like(run, reference.run, after=3 if step == "link" else 2)
    assert names(tmp_path) == ["ep1-ba7-rank0.pt", "ep1-ba8-rank0.pt", "latest-rank0.pt"]


def test_a_full_disk_is_one_error(world, finished, tmp_path, monkeypatch):
    reference = finished("full")
    save = torch.save

    def full(state, file, *args, **kwargs):
        if "ep0-ba3" in str(getattr(file, "name", "")):
            file.write(b"PK half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    message = r"no space left .* for ep0-ba3-rank0.pt \(.* free\); .*ep0-ba2-rank0.pt is intact"
    with pytest.raises(OSError, match=message) as caught:
        kit.run(config(world, reference, tmp_path))
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["ep0-ba1-rank0.pt", "ep0-ba2-rank0.pt", "latest-rank0.pt"]
    monkeypatch.undo()
    run = kit.run(config(world, reference, tmp_path))
    assert_ends_like(run, reference.run, after=2)


# --- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["truncated", "empty", "flipped", "link gone"])
def test_a_corrupted_newest_checkpoint_is_skipped(
    world, finished, crashed, tmp_path, caplog, capsys, spoil
):
    reference = finished("lora")
    crashed(tmp_path, "lora", after=6)
    folder = tmp_path / "checkpoints"
    newest = folder / "ep1-ba5-rank0.pt"
    content = newest.read_bytes()
    if spoil == "flipped":
        content = content[:30_000] + bytes([content[30_000] ^ 1]) + content[30_001:]
    elif spoil == "link gone":
        (folder / "latest-rank0.pt").unlink()
    else:
        content = content[: {"truncated": len(content) // 2, "empty": 0}[spoil]]
    newest.write_bytes(content)
    assert "continuing from" not in capsys.readouterr().err
    run = kit.run(config(world, reference, tmp_path, "lora"))
    assert_ends_like(run, reference.run, after=5 if spoil == "link gone" else 4)
    lines = [r.getMessage() for r in caplog.records if "damaged-ep1-ba5-rank0.pt" in r.getMessage()]
    assert len(lines) == (spoil != "link gone")
    batch = 5 if spoil == "link gone" else 4
    intact = folder / f"ep{batch // 5}-ba{batch}-rank0.pt"
    assert f"continuing from {intact}, after batch {batch}\n" in capsys.readouterr().err
    assert all(str(newest) in line and line.endswith("ep0-ba4-rank0.pt") for line in lines)


def test_no_intact_checkpoint_does_not_start_from_the_beginning(world, finished, tmp_path):
    reference = finished("full")
    crash(world, reference, tmp_path, after=3, save_num_checkpoints_to_keep=1)
    path = tmp_path / "checkpoints" / "ep0-ba2-rank0.pt"
    path.write_bytes(path.read_bytes()[:1000])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint is intact.*ep0-ba2-rank0.pt"):
            kit.run(config(world, reference, tmp_path))


def test_a_later_checkpoint_named_after_the_run_is_not_overwritten(world, finished, tmp_path):
    reference = finished("full")
    named = {"save_filename": "{run_name}-ba{batch}.pt", "autoresume": False}
    kit.run(config(world, reference, tmp_path, **named, max_duration="3ba"))
    assert names(tmp_path)[:2] == ["full-ba2.pt", "full-ba3.pt"]
    for batch in (2, 3):
        start = f"{tmp_path}/checkpoints/full-ba{batch}.pt"
        given = config(world, reference, tmp_path, **named, load_path=start)
        if batch == 2:
            with pytest.raises(UserError, match=r"full-ba3.pt is later than"):
                kit.run(given)
        else:
            kit.run(given)


def test_a_corrupted_load_path_is_named(world, finished, tmp_path):
    reference = finished("full")
    path = tmp_path / "cut.pt"
    path.write_bytes(kit.checkpoint(reference.folder, 2).read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"load_path: .*cut.pt cannot be read"):
        kit.run(config(world, reference, tmp_path, load_path=str(path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 18}, "another seed: 17, now 18"),
        ({"model__peft_config__use_rslora": True}, "another .*use_rslora: None, now True"),
        ({"model__peft_config__lora_alpha": 16}, "another model.peft_config.lora_alpha: 8, now 16"),
        ({"optimizer__lr": 0.5}, "another optimizer.lr: 0.01, now 0.5"),
        ({"optimizer__name": "fused_adamw"}, "optimizer.name: decoupled_adamw, now fused_adamw"),
        ({"optimizer__betas": [0.9, 0.99]}, r"optimizer.betas: \[0.9, 0.95\], now \[0.9, 0.99\]"),
        ({"scheduler__t_warmup": "1ba"}, "another scheduler.t_warmup: 2ba, now 1ba"),
        ({"algorithms": {}}, "another algorithms.gradient_clipping.clipping_threshold: 1.0, now N"),
        ({"global_train_batch_size": 1}, "another global_train_batch_size: 3, now 1"),
        ({"model__pretrained_model_name_or_path": "other"}, "another model.pretrained_model_name"),
        (
            {"max_duration": "1ba"},
            "max_duration: 2ep, now 1ba, which the checkpoint is already past",
        ),
        ({"run_name": "b"}, "another run_name: lora, now b"),
        ({"save_filename": "b{batch}.pt"}, "none is named like save_filename, b{batch}.pt"),
        ({"train_loader__dataset__pack_tokens": 96}, "pack_tokens: 64, now 96"),
        ({"train_loader__dataset__shuffle_seed": 3}, "shuffle_seed: .*, now 3"),
        ({"train_loader__dataset__shuffle": False}, "shuffle: 1, now 0"),
        ({"train_loader__dataset__hf_name": "eval"}, "documents' tokens and labels: .*, now"),
    ],
)
def test_what_changed_is_named(world, finished, crashed, tmp_path, change, message):
    """LoRA and rsLoRA have weights of the same names and shapes: nothing else would notice."""
    reference = finished("lora")
    crashed(tmp_path, "lora", after=3)
    other = tmp_path / "other"
    shutil.copytree(world.base, other)
    places = {"eval": str(world.eval_rows), "other": str(other)}
    change = {key: places.get(v, v) if isinstance(v, str) else v for key, v in change.items()}
    with pytest.raises(ValueError, match=message):
        kit.run(config(world, reference, tmp_path, "lora", **change))


@pytest.mark.parametrize("change", [{"device_train_microbatch_size": 3}, {"eval_interval": 0}])
def test_what_decides_no_batch_may_change(world, finished, crashed, tmp_path, change):
    reference = finished("full")
    crashed(tmp_path, after=6)
    run = kit.run(config(world, reference, tmp_path, **change))
    assert run.losses == pytest.approx(reference.run.losses[5:], rel=1e-5)
    for batch, expected in zip(run.spy.batches, reference.run.spy.batches[5:], strict=True):
        pairs = zip(kit.documents_of(batch), kit.documents_of(expected), strict=True)
        assert all(torch.equal(a[0], b[0]) for a, b in pairs)


def test_a_longer_duration_continues_with_a_warning(world, finished, tmp_path, caplog):
    reference = finished("full")
    given = {"scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"}}
    kit.run(config(world, reference, tmp_path, max_duration="3ba", **given))
    run = kit.run(config(world, reference, tmp_path, max_duration="5ba", **given))
    uninterrupted = kit.run(config(world, reference, tmp_path / "b", max_duration="5ba", **given))
    assert run.losses == uninterrupted.losses[3:]
    assert "max_duration: 3ba, now 5ba. A schedule" in caplog.text


def test_an_adapter_on_other_weights_of_the_same_name_is_refused(world, finished, tmp_path):
    reference = finished("lora")
    shutil.copytree(world.base, tmp_path / "base")
    base = {"model__pretrained_model_name_or_path": str(tmp_path / "base")}
    crash(world, reference, tmp_path, "lora", after=3, **base)
    weights = load_file(tmp_path / "base/model.safetensors")
    changed = {name: 1.5 * weight for name, weight in weights.items()}
    save_file(changed, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"another base model: weights .*, now "):
        kit.run(config(world, reference, tmp_path, "lora", **base))


def test_the_same_duration_in_other_words_is_the_same(world, finished, tmp_path, caplog):
    reference = finished("full")
    kit.run(config(world, reference, tmp_path, max_duration="1ep"))
    kit.run(config(world, reference, tmp_path, max_duration="1 ep"))
    assert "max_duration" not in caplog.text


def test_a_secret_s_variable_set_meanwhile_changes_nothing(
    world, finished, crashed, tmp_path, monkeypatch
):
    reference = finished("full")
    crashed(tmp_path, after=3)
    monkeypatch.setenv("SECRETS_DIR", str(world.base.parent))
    assert_ends_like(kit.run(config(world, reference, tmp_path)), reference.run, after=2)


def test_other_files_beside_checkpoints_are_ignored(world, finished, tmp_path):
    """W&B's link and the weights that a run starts from are not its checkpoints."""
    reference = finished("full")
    folder = tmp_path / "checkpoints"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb/latest-run").symlink_to("nowhere")
    shutil.copy(kit.checkpoint(reference.folder, 2), folder / "given.pt")
    begin = {"load_path": str(folder / "given.pt"), "load_weights_only": True}
    kit.run(config(world, reference, tmp_path, max_duration="1ba", **begin))


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(world, finished, crashed, tmp_path):
    reference = finished("full")
    crashed(tmp_path, after=3)
    for path in (tmp_path / "checkpoints").glob("ep*"):
        path.unlink()
    with pytest.raises(ValueError, match="there are checkpoints, but none is named like save_fil"):
        kit.run(config(world, reference, tmp_path))


def test_a_second_start_is_refused_while_the_first_runs(world, finished, tmp_path):
    """The first run is another process, because a process does not lock itself out."""
    reference = finished("full")
    folder = tmp_path / "checkpoints"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from foundry_ext.checkpoints.folder_lock import FolderLock\n"
        f"FolderLock(Path({str(folder)!r})).take()\nprint('taken', flush=True)\ntime.sleep(99)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert first.stdout and first.stdout.readline() == b"taken\n"
    try:
        message = rf"checkpoints: another run \(process {first.pid} on .*\) is still saving"
        with pytest.raises(ValueError, match=message):
            kit.run(config(world, reference, tmp_path))
    finally:
        first.kill()
        first.wait()
    kit.run(config(world, reference, tmp_path, max_duration="1ba"))  # a dead process holds no lock


# --- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("batch", [3, 4])
def test_a_signal_saves_and_ends(world, finished, tmp_path, capfd, number, batch):
    """Batch 3 is inside an epoch and followed by an evaluation, batch 4 is the epoch's last."""
    reference = finished("lora")
    given = with_record(tmp_path)
    given["callbacks"]["signal_at"] = {"batch": batch, "number": int(number)}
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        kit.run(config(world, reference, tmp_path, "lora", save_interval="1000ba", **given))
    assert ended.value.code == 128 + number
    name = f"ep0-ba{batch}-rank0.pt"
    assert names(tmp_path) == [name, "latest-rank0.pt"]
    record = read_record(tmp_path / "record.json")
    assert (record["status"], record["steps"]) == ("stopped", batch)
    assert record["error"].startswith(f"stopped by {number.name} after batch {batch}; saved")
    assert f"{number.name}: saving" in capfd.readouterr().err
    ended.value.__traceback__ = None
    run = kit.run(config(world, reference, tmp_path, "lora", **with_record(tmp_path)))
    assert_ends_like(run, reference.run, after=batch)
    record = read_record(tmp_path / "record.json")
    assert (record["status"], record["error"]) == ("finished", None)
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_the_second_signal_ends_at_once(world, finished, tmp_path, monkeypatch):
    reference = finished("full")
    monkeypatch.setattr(signals, "ECHO_SECONDS", 0.0)
    callbacks = {"signal_at": {"batch": 3, "number": int(signal.SIGTERM), "times": 2}}
    with pytest.raises(SystemExit) as ended:
        kit.run(config(world, reference, tmp_path, callbacks=callbacks))
    assert ended.value.code == 128 + signal.SIGTERM
    assert "ep0-ba3-rank0.pt" not in names(tmp_path)


def test_sigterm_that_a_launcher_passes_on_is_no_second_one(world, finished, tmp_path):
    """At a shutdown all processes receive SIGTERM, and the launcher sends it to its ranks again."""
    reference = finished("full")
    callbacks = {"signal_at": {"batch": 3, "number": int(signal.SIGTERM), "times": 2}}
    with pytest.raises(SystemExit) as ended:
        kit.run(config(world, reference, tmp_path, callbacks=callbacks))
    assert ended.value.code == 128 + signal.SIGTERM
    assert "ep0-ba3-rank0.pt" in names(tmp_path)


def test_a_signal_in_the_last_batch_lets_the_run_end(world, finished, tmp_path):
    reference = finished("full")
    given = with_record(tmp_path)
    given["callbacks"]["signal_at"] = {"batch": LAST, "number": int(signal.SIGTERM)}
    given["max_duration"] = f"{LAST}ba"
    run = kit.run(config(world, reference, tmp_path, **given))
    assert_ends_like(run, reference.run, after=0)
    assert read_record(tmp_path / "record.json")["status"] == "finished"


# --- the end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("duration", ["2ep", f"{LAST}ba", "6ba"])
def test_killed_after_the_last_batch(world, finished, tmp_path, duration):
    """Composer would refuse to train nothing, so export and record would never be written."""
    reference = finished("full")
    given = {**with_record(tmp_path), "max_duration": duration}
    given["callbacks"]["hf_export"] = {"folder": str(tmp_path / "hf")}
    first_run = kit.run(config(world, reference, tmp_path, **given))
    for name in ("hf", "record.json"):
        (tmp_path / name).rename(tmp_path / f"first-{name}")
    run = kit.run(config(world, reference, tmp_path, **given))
    assert all(torch.equal(run.weights[name], w) for name, w in first_run.weights.items())
    names = [sorted(p.name for p in (tmp_path / x).iterdir()) for x in ("hf", "first-hf")]
    assert names[0] == names[1]
    first, second = (read_record(tmp_path / n) for n in ("first-record.json", "record.json"))
    assert second["status"] == "finished"
    assert second["evaluations"] == first["evaluations"]
    assert second["steps"] == first["steps"] and second["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_folder": None}, "exact_resume: save_folder is missing"),
        ({"save_folder": "s3://bucket/x"}, "save_folder s3://bucket/x must be a folder"),
        ({"save_num_checkpoints_to_keep": 0}, "save_num_checkpoints_to_keep: 0 leaves nothing"),
        ({"save_weights_only": True}, "save_weights_only: True leaves too little"),
        ({"save_ignore_keys": ["state/optimizers"]}, "save_ignore_keys: .* leaves too little"),
    ],
)
def test_impossible_settings(world, finished, tmp_path, change, message):
    change = {"autoresume": False, **change}
    with pytest.raises(ValueError, match=message):
        kit.run(config(world, finished("full"), tmp_path, **change))
