"""Cases of bad disks, networks, GPUs, and files of other commands."""

import errno
from typing import Any

import torch

from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from tests.system.bad_input.bench import Bench, Ended
from tests.system.bad_input.case import Case, change, nothing

_ELSEWHERE = "name a folder that can"


def _below_a_file(key: str):
    def spoil(bench: Bench) -> None:
        (bench.folder / "file").write_text("")
        bench.change(**{key: str(bench.folder / "file" / "x" / "y")})

    return spoil


def _raising(error: BaseException):
    """Return a change that raises an error in the first forward pass of training."""

    def spoil(bench: Bench) -> None:
        def forward(*_: Any, **__: Any) -> None:
            raise error

        bench.monkeypatch.setattr(SmolLM2ForCausalLM, "forward", forward)

    return spoil


def _out_of_memory(**values: Any):
    text = "CUDA out of memory. Tried to allocate 2.00 GiB"

    def spoil(bench: Bench) -> None:
        bench.data(**values.pop("dataset", {}))
        bench.change(**values)
        _raising(torch.cuda.OutOfMemoryError(text))(bench)

    return spoil


def _full_disk(bench: Bench) -> None:
    """Fill the disk of the token cache."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "part.arrow")

    bench.rows([{"prompt": "of these", "response": "no tokens are cached"}] * 9)
    bench.monkeypatch.setattr("foundry_ext.utils.atomic.sync", full)


def _no_key(bench: Bench) -> None:
    """Simulate a machine without a W&B login and without a terminal to ask at."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        bench.monkeypatch.delenv(name, raising=False)
    bench.monkeypatch.setenv("NETRC", str(bench.folder / "netrc"))
    bench.monkeypatch.setenv("HOME", str(bench.folder))
    bench.monkeypatch.setenv("WANDB_SILENT", "true")
    settings = {"project": "p", "init_kwargs": {"dir": str(bench.folder)}}
    bench.change(loggers={"wandb_metrics": settings})


def _no_network(bench: Bench) -> None:
    import wandb

    _no_key(bench)
    bench.monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = wandb.init

    def init(**settings: Any) -> Any:
        if settings.get("mode") != "offline":
            raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec")
        return start(**settings)

    bench.monkeypatch.setattr(wandb, "init", init)


def _went_offline(bench: Bench) -> None:
    assert list(bench.folder.glob("wandb/offline-run-*/*.wandb"))


def _sweep(parameters: str):
    def start(bench: Bench) -> Ended:
        path = bench.folder / "sweep.yaml"
        path.write_text(f"program: train.py\nmethod: grid\nparameters:{parameters}\n")
        try:
            return bench.command("sweep", str(path), "--yes")
        finally:
            path.unlink()

    return start


def _compare(content: str | None):
    def start(bench: Bench) -> Ended:
        record = bench.folder / "record.json"
        if content is not None:
            record.write_text(content)
        try:
            return bench.command("compare", str(record), "--out", str(bench.folder / "report"))
        finally:
            record.unlink(missing_ok=True)

    return start


def _export(bench: Bench) -> Ended:
    checkpoint = bench.folder / "a.pt"
    checkpoint.write_bytes(b"PK\3\4 cut")
    try:
        return bench.command("export", str(checkpoint), str(bench.folder / "out"))
    finally:
        checkpoint.unlink()


FOLDERS = [
    Case("save_folder below a file", _below_a_file("save_folder"),
         ("save_folder, ", "file: Not a directory", _ELSEWHERE)),
    Case("save_folder nowhere", change(save_folder="/proc/x"),
         ("save_folder, '/proc/x', cannot be written: /proc", _ELSEWHERE)),
    Case("record below a file", _below_a_file("callbacks__run_record__path"),
         ("callbacks.run_record.path, ", "file: Not a directory", _ELSEWHERE)),
    Case("metrics below a file", _below_a_file("loggers__metrics_file__path"),
         ("loggers.metrics_file.path, ", "file: Not a directory", _ELSEWHERE)),
]  # fmt: skip

COMMANDS = [
    Case("sweep: no values", nothing, ("sweep.yaml: parameter seed: values, []", "must be a list"),
         _sweep(" {seed: {values: []}}")),
    Case("sweep: no parameters", nothing, ("sweep.yaml: parameters is empty", "write name:"),
         _sweep(" {}")),
    Case("sweep: no file", nothing, ("none.yaml: no such sweep file",),
         lambda bench: bench.command("sweep", "none.yaml")),
    Case("compare: no record", nothing, ("record.json: no such run",), _compare(None)),
    Case("compare: broken record", nothing, ("record.json: ", "line 1"), _compare('{"a": ')),
    Case("compare: another file", nothing, ("record.json: ", "schema_version is missing"),
         _compare("{}")),
    Case("export: a cut checkpoint", nothing, ("a.pt is not a readable Composer checkpoint",),
         _export),
    Case("inspect: no file", nothing, ("none.yaml: no such file",),
         lambda bench: bench.command("inspect", "none.yaml")),
]  # fmt: skip

ENDED = [
    Case("GPU out of memory", _out_of_memory(dataset={"pack_tokens": 4096}),
         ("GPU out of memory with train_loader.dataset.pack_tokens 4096; try 2048",
          "activation_checkpointing: true", "Tried to allocate 2.00 GiB"), code=1),
    Case("GPU out of memory, packs of one document", _out_of_memory(dataset={"pack_tokens": 32}),
         ("pack_tokens 32, and documents have up to max_seq_len 32", "max_seq_len to 16"),
         code=1),
    Case("GPU out of memory, several packs", _out_of_memory(device_train_microbatch_size=3),
         ("set device_train_microbatch_size to 1 and, if that is not enough, train_loader.datas",),
         code=1),
    Case("a GPU that torch does not know", _raising(RuntimeError(
        "CUDA error: no kernel image is available for execution on the device")),
         ("not one that the installed torch was built for", "make install WORLD=current"), code=1),
    Case("a GPU that flash attention does not know", _raising(RuntimeError(
        "FlashAttention only supports Ampere GPUs or newer.")),
         ("model.attention_backend, 'auto', does not run on this GPU; set it to flex",), code=1),
    Case("disk full while training", _raising(OSError(errno.ENOSPC, "No space left", "a.pt")),
         ("no space is left for a.pt; make some", "start the same command again"), code=1),
]  # fmt: skip

NO_SPACE = [
    Case("more than memory", change(model__config_overrides__intermediate_size=10**13),
         ("this machine's memory cannot hold what the run needs; `foundry-ext plan` says",
          "can't allocate memory"), code=1),
    Case("disk full while tokenizing", _full_disk,
         ("no space is left for part.arrow; make some", "HF_DATASETS_CACHE",
          "No space left on device"), code=1),
]  # fmt: skip

ALLOWED = [
    Case("W&B without a key", _no_key,
         ("W&B cannot be reached (there is no key", "continues offline", "wandb sync"),
         holds=_went_offline),
    Case("W&B without a network", _no_network,
         ("W&B cannot be reached (Run initialization has timed out", "continues offline"),
         holds=_went_offline),
]  # fmt: skip
