"""Every combination has the settings that its own file had, when there was one file per run.

golden/settings.json has one entry per dotted key of the 84 files: its value, or `by` and `values`
if it depends on size, data set or method. {run_name}, {size}, {data} and {method} stand for those
of the run. The file of yamls/fsdp is stored completely.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foundry_ext.records.result_settings import digest_settings, result_settings
from tests.yamls.combinations import COMBINATIONS, ROOT, Combination, resolved, settled

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("settings.json").read_text())
SHARDED = "smollm2-1.7b_metamathqa_full_8gpu"
RUNS = [run for run in COMBINATIONS if run.data != "own"]


def expected(run: Combination) -> dict[str, Any]:
    """Return the stored settings of one run, {dotted key: value}."""
    names = {**run._asdict(), "run_name": run.run_name}
    found = {}
    for key, entry in GOLDEN["runs"].items():
        if isinstance(entry, dict) and "by" in entry:
            name = " ".join(names[dimension] for dimension in entry["by"])
            if name not in entry["values"]:
                continue
            entry = entry["values"][name]
        found[key] = _filled(entry, names)
    return found


def _filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_filled(child, names) for child in value]
    if isinstance(value, str):
        for name, text in names.items():
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


def settings(config: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return all settings, but only those variables that the old file had."""
    found = dict(leaves(config))
    return {
        key: value
        for key, value in found.items()
        if key in wanted or not key.startswith("variables.")
    }


def test_the_stored_runs_are_84():
    assert len(RUNS) == 84
    values = [entry for entry in GOLDEN["runs"].values() if isinstance(entry, dict)]
    assert len(GOLDEN["runs"]) > 130 and any(len(one.get("values", ())) > 50 for one in values)


@pytest.mark.parametrize("run", RUNS, ids="_".join)
def test_a_run_has_the_settings_it_had(run: Combination):
    wanted = expected(run)
    assert settings(resolved(run), wanted) == wanted


def test_the_sharded_run_has_the_settings_it_had():
    path = ROOT / f"yamls/fsdp/{SHARDED}.yaml"
    assert dict(leaves(settled(path, []))) == GOLDEN[SHARDED]


def test_a_checkpoint_of_the_old_file_is_resumed():
    """The digest of a list depends on the order of keys, which the settings above do not show."""
    run = Combination("finetune", "metamathqa-replay", "135m", "lora")
    digests = digest_settings(result_settings(resolved(run)))
    assert digests["train_loader.dataset.datasets"][0] == "6caf338d3d821c42"
