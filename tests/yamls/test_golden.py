"""The settings of the 84 files and of yamls/fsdp as they were when each run had a file of its own.

golden/settings.json has one entry per dotted key: its value, or `by` and `values` where it depends
on size, data set or method. {run_name}, {size}, {data} and {method} stand for the run's own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("settings.json").read_text())
SHARDED = "smollm2-1.7b_metamathqa_full_8gpu"
SIZES = ("135m", "360m", "1.7b")
DATA = {
    "finetune": ("metamathqa", "magicoder", "gsm8k", "metamathqa-replay"),
    "pretrain": ("python-edu", "openwebmath", "finemath"),
}
METHODS = ("full", "lora", "dora", "rslora")
RUNS = [
    (kind, size, data, method)
    for kind, names in DATA.items()
    for data in names
    for size in SIZES
    for method in METHODS
]


def expected(size: str, data: str, method: str) -> dict[str, Any]:
    """Return the stored settings of one run, {dotted key: value}."""
    run = {"size": size, "data": data, "method": method}
    run["run_name"] = f"smollm2-{size}_{data}_{method}"
    found = {}
    for key, entry in GOLDEN["runs"].items():
        if isinstance(entry, dict) and "by" in entry:
            name = " ".join(run[dimension] for dimension in entry["by"])
            if name not in entry["values"]:
                continue
            entry = entry["values"][name]
        found[key] = _filled(entry, run)
    return found


def _filled(value: Any, run: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_filled(one, run) for one in value]
    if isinstance(value, str):
        for name, text in run.items():
            value = value.replace(f"{{{name}}}", text)
    return value


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value); a list is one value unless it holds mappings."""
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and any(isinstance(child, dict) for child in node):
        for index, child in enumerate(node):
            yield from leaves(child, f"{key}.{index}")
    else:
        yield key, node


def settings(path: Path) -> dict[str, Any]:
    """Return what a file resolves to, {dotted key: value}."""
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(config, dict)
    return dict(leaves(config))


@pytest.mark.parametrize("run", RUNS, ids="_".join)
def test_a_run_has_the_settings_it_had(run: tuple[str, str, str, str]):
    kind, size, data, method = run
    path = ROOT / f"yamls/{kind}/smollm2-{size}_{data}_{method}.yaml"
    assert settings(path) == expected(size, data, method)


def test_the_sharded_run_has_the_settings_it_had():
    assert settings(ROOT / f"yamls/fsdp/{SHARDED}.yaml") == GOLDEN[SHARDED]
