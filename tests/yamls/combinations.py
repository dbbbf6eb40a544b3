"""The eight files, and the combinations of size, data set and method that they cover."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from foundry_ext.config.automatic import settle
from foundry_ext.config.loading import load_config

ROOT = Path(__file__).parents[2]
FOLDERS = {"finetune": ROOT / "yamls", "pretrain": ROOT / "yamls/pretrain"}
SIZES = ("135m", "360m", "1.7b")
CARDS = ("24gb", "80gb")
METHODS = ("full", "lora", "dora", "rslora")
DATA = {
    "finetune": ("metamathqa", "magicoder", "gsm8k", "metamathqa-replay", "own"),
    "pretrain": ("python-edu", "openwebmath", "finemath", "own"),
}
# Paths without a suffix: of a file's name it is checked that the file is there.
OWN = ("variables.train_path=rows/train", "variables.eval_path=rows/eval")


class Combination(NamedTuple):
    """One run."""

    kind: str
    data: str
    size: str
    method: str

    @property
    def path(self) -> Path:
        return FOLDERS[self.kind] / f"smollm2_{self.method}.yaml"

    @property
    def overrides(self) -> list[str]:
        own = OWN if self.data == "own" else ()
        return [f"variables.size={self.size}", f"variables.data={self.data}", *own]

    @property
    def experiment(self) -> str:
        """The data set's name in those of runs; rows and pages of one's own have two."""
        return "own-text" if (self.kind, self.data) == ("pretrain", "own") else self.data

    @property
    def run_name(self) -> str:
        return f"smollm2-{self.size}_{self.experiment}_{self.method}"


COMBINATIONS = [
    Combination(kind, data, size, method)
    for kind, names in DATA.items()
    for data in names
    for size in SIZES
    for method in METHODS
]
FILES = sorted({combination.path for combination in COMBINATIONS})


@cache
def resolved(run: Combination, card: str = "24gb") -> dict[str, Any]:
    """Return the run's configuration, which must not be changed."""
    return settled(run.path, [*run.overrides, f"variables.card={card}"])


def settled(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration that a run on a CPU has."""
    loaded = load_config(path, overrides)
    settle(loaded, has_gpu=False)
    config = OmegaConf.to_container(loaded, resolve=True)
    assert isinstance(config, dict)
    return config
