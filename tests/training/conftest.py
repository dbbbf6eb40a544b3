"""Inputs of these tests, and a finished run per method; tests must not change them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.training import kit


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread: with tiny tensors more threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer_folder, make_rows):
    return kit.make_world(tmp_path_factory.mktemp("world"), tokenizer_folder, make_rows)


@dataclass(frozen=True)
class Finished:
    folder: Path
    run: kit.Run
    settings: dict


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """Return finished(method): an uninterrupted run of two epochs, with a checkpoint per batch."""
    made: dict[str, Finished] = {}

    def get(method: str) -> Finished:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            settings = {
                "callbacks": {"spy": {}, "hf_export": {"folder": str(folder / "hf")}},
                "eval_loader": kit.loader_config(world.eval_rows, eval_packs=1),
                "eval_interval": "3ba",
                "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "2ba", "alpha_f": 0},
            }
            run = kit.run(kit.run_config(world, folder, method, **settings))
            made[method] = Finished(folder, run, settings)
        return made[method]

    return get
