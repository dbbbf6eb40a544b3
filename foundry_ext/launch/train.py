"""Entry point of `composer train.py a.yaml [b.yaml ...] [key=value ...]`.

One file trains in this process; sequence.py runs several. With --dry-run each file is planned and
nothing is trained. A mistake of the user ends in one line,
`train.py: error: <file>: <what>, <value>; <way out>`, and exit code 2. A failed read or write, or
another known failure (failures.py), ends in such a line and exit code 1. Every other error keeps
its traceback; --traceback shows the others' too.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from foundry_ext.config.automatic import COMPILE, automatic_keys, compiles_on_gpu, in_effect, settle
from foundry_ext.config.loading import check_several, load_config, record_path, split_arguments
from foundry_ext.config.values import find_warning
from foundry_ext.launch.building import errors_name_their_section, no_questions
from foundry_ext.launch.console import configuration_on_one_line, format_end, is_rank_zero
from foundry_ext.launch.failures import explain, missing_checkpoint, unwritable
from foundry_ext.launch.finished import describe_finished
from foundry_ext.launch.nodes import check_configurations, share_fault, signals_per_node
from foundry_ext.launch.sequence import train_in_turn
from foundry_ext.launch.trainer_checks import trainer_is_checked
from foundry_ext.utils.allocator import keep_freed_memory
from foundry_ext.utils.environment import has_gpu
from foundry_ext.utils.errors import TRACEBACK_VARIABLE, UserError, one_line, wants_traceback
from foundry_ext.utils.output import quiet_libraries, redacted_arguments, redacted_output
from foundry_ext.utils.progress import announce
from foundry_ext.utils.redaction import remember_secrets

USAGE = """usage: composer train.py a.yaml [b.yaml ...] [key=value ...] [--dry-run] [--traceback]

  a.yaml      a run; several are trained one after another, each in a fresh process
  key=value   an override for every file, such as optimizer.lr=1e-4
  --dry-run   train nothing; print what each run would do, its memory and its time
  --traceback show the traceback of every error
"""
DRY_RUN, TRACEBACK = "--dry-run", "--traceback"
# The variables of a launcher for a process that runs alone.
ALONE = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "NODE_RANK"), "0"),
    **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
}
USAGE_EXIT, FAILURE_EXIT = 2, 1
TRACEBACK_HINT = f"({TRACEBACK} shows the traceback)"


def main(script: str, arguments: Sequence[str]) -> int:
    """Return the exit code of train.py.

    Args:
        script: the path of train.py, which runs of several files are started with.
        arguments: its command line.
    """
    remember_secrets(list(arguments))
    quiet_libraries()
    with redacted_output(is_progress=True):
        return _main(script, arguments)


def _main(script: str, arguments: Sequence[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_EXIT
    if TRACEBACK in arguments:
        os.environ[TRACEBACK_VARIABLE] = "1"  # which the runs of several files inherit
    dry_run, options = DRY_RUN in arguments, (DRY_RUN, TRACEBACK)
    try:
        files, overrides = split_arguments([word for word in arguments if word not in options])
        configs, complaints = check_all(files, overrides)
    except UserError as error:
        if wants_traceback():
            if not dry_run:
                share_fault(error)
            raise
        configs, complaints = [], [str(error)]
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other ranks find the same errors
        for line in complaints:
            print(f"train.py: error: {line}", file=sys.stderr)
    if not configs:
        if not dry_run:
            share_fault(complaints[0])
        return USAGE_EXIT
    if dry_run:
        found = plan_each(configs)
        return USAGE_EXIT if complaints else found
    if len(files) == 1:
        return train_here(*configs[0], overrides)
    # A file with a mistake is started too: it fails at once and is named in the summary.
    return train_in_turn(script, files, overrides)


def check_all(
    files: Sequence[Path], overrides: Sequence[str]
) -> tuple[list[tuple[Path, DictConfig]], list[str]]:
    """Return the configurations of the valid files, and one error line for each other file.

    All files are checked before the first one starts, so that a mistake in the last file is found
    now and not tomorrow morning.
    """
    configs: list[tuple[Path, DictConfig]] = []
    complaints: list[str] = []
    num_ranks, ranks_here = (os.environ.get(f"{x}WORLD_SIZE", "1") for x in ("", "LOCAL_"))
    if len(files) > 1 and num_ranks != ranks_here:  # each node would train by itself
        raise UserError(f"{files[1]}: {len(files)} files on several nodes; start one at a time")
    for path in files:
        try:
            configs.append((path, load_config(path, overrides)))
        except UserError as error:
            if wants_traceback():
                raise
            complaints.append(str(error))
    if len(configs) > 1:
        paths, loaded = zip(*configs, strict=True)
        check_several(paths, loaded, overrides)
    return configs, list(dict.fromkeys(complaints))


def train_here(path: Path, config: DictConfig, overrides: Sequence[str] = ()) -> int:
    """Train one run in this process and return the exit code.

    `overrides` are in the configuration already; a message repeats them.
    """
    finished = describe_finished(_resolved(config))
    if finished:
        if is_rank_zero():
            print(f"train.py: {path}: {finished}", flush=True)
        return 0
    automatic = automatic_keys(config)
    resolved = _settled(path, config)
    fault = missing_checkpoint(resolved) or unwritable(resolved)
    if fault:
        complain(path, fault)
        share_fault(fault)
        return USAGE_EXIT
    warning = find_warning(resolved)
    if warning and is_rank_zero():
        print(f"train.py: warning: {path}: {warning}", file=sys.stderr)
    from composer.utils import format_name_with_dist
    from llmfoundry.command_utils import train

    from foundry_ext.checkpoints.load_path import check_load_path
    from foundry_ext.preflight.components import check_components
    from foundry_ext.training.weight_checks import check_final_weights

    try:
        check_configurations(resolved)
        check_components(resolved)
        if config.get("load_path") and "exact_resume" not in (config.get("callbacks") or {}):
            check_load_path(format_name_with_dist(config.load_path, str(config.get("run_name"))))
        with (
            configuration_on_one_line(path, overrides),
            redacted_arguments(),
            no_questions(),
            errors_name_their_section(),
            trainer_is_checked(resolved, automatic),
            signals_per_node(),
        ):
            trainer = train_recorded(train, config)
        check_final_weights(trainer.state)  # of a run that has neither a record nor an export
    except Exception as error:
        known = share_fault(error) or explain(error, resolved)
        if wants_traceback() or not (known or isinstance(error, UserError | OSError)):
            raise
        complain(path, f"{known or one_line(error)} {TRACEBACK_HINT}")
        return USAGE_EXIT if known is None and isinstance(error, UserError) else FAILURE_EXIT
    trainer.close()  # loggers flush
    if is_rank_zero():
        print(format_end({**resolved, "run_name": trainer.state.run_name}), flush=True)
    return 0


def _settled(path: Path, config: DictConfig) -> dict[str, Any]:
    """Give automatic settings their values on this machine; return the resolved configuration."""
    chosen = settle(config, has_gpu=has_gpu())
    if chosen and in_effect(config, COMPILE) != "none" and is_rank_zero():
        print(f"train.py: {path}: {chosen}", file=sys.stderr)
    if not has_gpu():
        keep_freed_memory()
    return _resolved(config)


def _resolved(config: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def complain(path: Path, text: str) -> None:
    """Print an error line, on every rank.

    The launcher holds back the output of the other ranks and shows it if they failed.
    """
    rank = os.environ.get("RANK", "0")
    label = "train.py: error" if rank == "0" else f"train.py: error on rank {rank}"
    print(f"{label}: {path}: {text}", file=sys.stderr)


def plan_each(configs: Sequence[tuple[Path, DictConfig]]) -> int:
    """Print the plan of every run, on rank 0 only, because a plan needs no other process."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not is_rank_zero():
        return 0
    os.environ.update(ALONE if num_ranks > 1 else {})
    announce("loading torch and llm-foundry")
    from foundry_ext.preflight.components import check_components
    from foundry_ext.preflight.plan.plan import plan_config  # llm-foundry: some 20 seconds
    from foundry_ext.preflight.plan.text import format_plan

    code = 0
    for number, (path, config) in enumerate(configs):
        compiled = compiles_on_gpu(config)
        settle(config, has_gpu=has_gpu())
        resolved: Any = OmegaConf.to_container(config, resolve=True)
        try:
            check_components(resolved)
            plan = plan_config(
                resolved, name=str(path), num_ranks=num_ranks, compiles_on_gpu=compiled
            )
        except (UserError, OSError) as error:
            if wants_traceback():
                raise
            complain(path, f"{one_line(error)} {TRACEBACK_HINT}")
            code = USAGE_EXIT
            continue
        print("\n" * bool(number) + format_plan(plan), flush=True)
    return code


def train_recorded(train: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Return train(config); an exception is noted in the run's record before it is raised."""
    from foundry_ext.records.record import mark_failed, now  # not for a mere check of a YAML

    begun = now()
    try:
        return train(config)
    except BaseException as error:  # Ctrl-C and sys.exit end a run too
        path = record_path(config)
        if path is not None:
            mark_failed(path, error, since=begun)
        raise
