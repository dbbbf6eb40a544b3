"""One attention for all runs of a sweep on a CPU, where `attention_backend: auto` is measured.

Each run would find the same choice in the user's cache folder, unless the folder cannot be written,
was emptied, or the sweep continues on another machine. So the sweep asks once and tells its runs.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from foundry_ext.sweeps.plan import PlannedRun
from foundry_ext.utils.atomic import write_text
from foundry_ext.utils.constants import CPU_ATTENTION
from foundry_ext.utils.nested import get
from foundry_ext.utils.processes import environment_without_rank

# In a process of its own: this one may fork, so it must not compute (fork_launcher.py).
_ASK = """
import torch
from foundry_ext.models.attention import resolve_backend
print(resolve_backend("auto", device="cpu", dtype=torch.float32))
"""


def shared_attention(
    folder: Path, runs: Sequence[PlannedRun], *, was_started: bool, threads: Mapping[str, str]
) -> dict[str, str]:
    """Return the variable that names the attention of all runs, or {} if none needs it.

    Args:
        folder: of the sweep, which remembers the choice.
        runs: the sweep's runs.
        was_started: whether some run was started before. Without a remembered choice it was by an
            earlier version, where "auto" was blockwise.
        threads: variables that set the number of threads of a run.
    """
    environment = {**environment_without_rank(), **threads}
    if environment.get(CPU_ATTENTION) or not any(map(_is_automatic, runs)):
        return {}  # the runs inherit it
    path = folder / "cpu_attention"
    if path.exists():
        return {CPU_ATTENTION: path.read_text(encoding="utf-8").strip()}
    name = "blockwise"
    if not was_started:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK],
            env=environment,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        if asked.returncode != 0:
            return {}  # each run meets the same error, and says so in its log
        name = asked.stdout.split()[-1]
    write_text(path, f"{name}\n")
    return {CPU_ATTENTION: name}


def _is_automatic(run: PlannedRun) -> bool:
    model = run.config.get("model")
    is_ours = get(model, "name") == "smollm2_packed"
    return is_ours and get(model, "attention_backend") in (None, "auto")
