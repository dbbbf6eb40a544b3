"""Runs on several nodes: one configuration, faults that all are told, signal files per node."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from foundry_ext.launch.failures import causes
from foundry_ext.utils.absent import run_settings
from foundry_ext.utils.nested import leaves
from foundry_ext.utils.redaction import redact

# Keys that may differ from node to node, by their last part. The readers compare the data itself.
_SOURCES = ("cache_dir", "data_dir", "hf_name", "local", "prepared", "remote")
_OUTPUTS = ("filename", "folder", "items", "path")
_READING = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "timeout")
_WAY_OUT = (
    "start all nodes with the same YAML and the same overrides; only paths of data and of output,"
    " and the workers of a loader, may differ"
)


_TELL_TIMEOUT = 60.0  # seconds


def spans_nodes() -> bool:
    """Return whether the launcher has started ranks on several nodes."""
    return os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")


def check_configurations(config: Mapping[str, Any]) -> None:
    """Compare the configuration over all ranks, before one of them builds anything.

    Args:
        config: a resolved YAML.

    Raises:
        UserError: on every rank, if one rank has another value; names the keys, values and nodes.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from foundry_ext.data.ranks import check_same

    join(float(config.get("dist_timeout") or 600.0))
    check_same(comparable(config), _WAY_OUT)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value of all that must be the same on all nodes, without secrets.

    Files of `code_paths` are compared by content. `variables` only stand for other values.
    """
    settings = {key: value for key, value in run_settings(config).items() if key != "variables"}
    paths = settings.pop("code_paths", None) or ()
    items = {
        key: value
        for key, value in leaves(_with_braces(redact(settings)), into_lists=True)
        if value is not None and not _may_differ(key)
    }
    for index, path in enumerate(map(Path, paths)):
        content = path.read_bytes() if path.is_file() else b""
        items[f"code_paths[{index}] (content)"] = hashlib.sha256(content).hexdigest()[:16]
    return items


def _with_braces(node: Any) -> Any:
    """Return a copy with text for empty mappings, such as a callback's without settings."""
    if isinstance(node, Mapping):
        return {key: "{}" if child == {} else _with_braces(child) for key, child in node.items()}
    return [_with_braces(child) for child in node] if isinstance(node, list) else node


def _may_differ(key: str) -> bool:
    above, _, name = key.rpartition(".")
    if name in _READING or key == "save_folder":
        return True
    if ".dataset" in above:
        return name in _SOURCES or ".data_files" in key
    if above.startswith("callbacks.forgetting.sets."):
        return name == "path"  # the callback compares the rows themselves
    if above.startswith("loggers.") and above.endswith(".init_kwargs"):
        return name == "dir"
    return key.startswith(("callbacks.", "loggers.")) and name in _OUTPUTS


def join(timeout: float) -> None:
    """Join the process group, as llm-foundry does later; it then finds that there is one.

    Args:
        timeout: seconds that a collective may take, and that this rank waits for the others.
    """
    from composer.utils import dist, get_device

    dist.initialize_dist(get_device(None), timeout=timeout)


def share_fault(fault: BaseException | str) -> str | None:
    """Tell other nodes a fault, so that they end too; or return theirs, of which this is a result.

    In a collective, all that a node sees of another one's fault is that the other one has left.
    """
    if not spans_nodes():
        return None
    from foundry_ext.data.ranks import hear_others, tell_others

    with contextlib.suppress(Exception):  # without the others, the run ends with its own fault
        join(_TELL_TIMEOUT)
        # What a collective raises, maybe wrapped in the error of a section.
        is_collective = not isinstance(fault, str) and any(
            isinstance(cause, RuntimeError) for cause in causes(fault)
        )
        heard = hear_others() if is_collective else None
        if heard is not None:
            return heard
        tell_others(fault)
    return None


@contextlib.contextmanager
def signals_per_node() -> Iterator[None]:
    """Give each node's signal files another name.

    Composer takes node 0's name on every node. In a shared working directory two nodes would wait
    for, and remove, the same file.
    """
    from composer.utils import dist

    common = dist.get_node_signal_file_name

    def own(*arguments: Any) -> str:
        return f"{common(*arguments)}_{dist.get_node_rank()}"

    dist.get_node_signal_file_name = own
    try:
        yield
    finally:
        dist.get_node_signal_file_name = common
