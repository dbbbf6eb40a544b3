"""Workbench of a case: a valid run in a folder of its own, for the case to break."""

import contextlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from foundry_ext.cli import main as cli
from foundry_ext.launch import train as launch
from foundry_ext.records.record import read_record
from tests.training import kit


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command that ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of the error that a user sees."""
        return [line for line in self.err.splitlines() if ": error: " in line]


@dataclass
class Bench:
    """A small fine-tuning run, whose YAML is written when it starts."""

    folder: Path
    world: kit.World
    monkeypatch: pytest.MonkeyPatch
    config: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    """The YAML file itself, where a case writes it by hand."""

    def __post_init__(self):
        record = {"path": str(self.folder / "record.json"), "experiment": "e"}
        settings = {
            "callbacks": {"run_record": record},
            "loggers": {},
            "max_duration": "2ba",
            "log_config": True,
            "save_folder": str(self.folder / "checkpoints"),
        }
        config = kit.run_config(self.world, self.folder, "full", **settings)
        self.config = OmegaConf.to_container(config)  # pyright: ignore

    def change(self, **values: Any) -> None:
        """Set keys of the YAML, such as `change(model__loss="x")`; None removes a key."""
        for key, value in values.items():
            *parents, last = key.split("__")
            node = self.config
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
            if value is None:
                del node[last]

    def data(self, **values: Any) -> None:
        """Set keys of the train loader's `dataset`."""
        self.change(**{f"train_loader__dataset__{key}": value for key, value in values.items()})

    def rows(self, content: bytes | str | Iterable[Any], name: str = "rows.jsonl") -> Path:
        """Write the training file, from bytes or from rows to be written as JSON lines."""
        path = self.folder / name
        if isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        self.data(hf_name=str(path))
        return path

    def train(self, *overrides: str) -> Ended:
        """Run `python train.py run.yaml ...` in this process."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.config) if self.text is None else self.text)
        return self.call(launch.main, "train.py", [str(path), *overrides])

    def command(self, *arguments: str) -> Ended:
        """Run `foundry-ext ...` in this process."""
        return self.call(cli.main, list(arguments))

    def call(self, main: Any, *arguments: Any) -> Ended:
        """Call a program; an exception counts as a traceback and exit code 1."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(*arguments)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
        return Ended(code, out.getvalue(), err.getvalue())

    def written(self) -> set[str]:
        """Return files below the folder, and unfinished ones in the cache of tokens."""
        files = {str(path) for path in self.folder.rglob("*") if path.is_file()}
        cache = Path(datasets.config.HF_DATASETS_CACHE, "foundry_ext")
        return files | {str(path) for path in cache.glob("*.part")}

    def record(self) -> dict[str, Any]:
        return read_record(self.folder / "record.json")

    def assert_nothing_half_written(self) -> None:
        """Check that all checkpoints can be read and that no temporary file remains."""
        for path in map(Path, self.written()):
            assert not path.name.endswith((".partial", ".part", ".tmp")), path
            if path.suffix == ".pt":
                assert "state" in torch.load(path, weights_only=False, map_location="cpu")


def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a single process without a sweep, started by a user."""
    for name in ("WANDB_SWEEP_ID", "FOUNDRY_EXT_SWEEP", "FOUNDRY_EXT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
