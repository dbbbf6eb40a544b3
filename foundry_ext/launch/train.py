"""What `composer train.py a.yaml [b.yaml ...] [key=value ...]` does.

One file trains in this process; sequence.py takes several in turn. With --dry-run nothing is
trained: each file is planned, as `foundry-ext plan` does. Whatever goes wrong before
training starts ends in one line `train.py: error: <file>: <what>, <value>; <way out>` and exit
code 2; what failures.py knows of what goes wrong later, in such a line and exit code 1. Other
errors raised while training keep their traceback.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from foundry_ext.config.loading import (
    UsageError,
    check_several,
    first_line,
    load_config,
    one_line,
    record_path,
    split_arguments,
    suggest,
)
from foundry_ext.launch.failures import explain, missing_checkpoint, unwritable
from foundry_ext.launch.sequence import train_in_turn
from foundry_ext.utils.redaction import redact

USAGE = """usage: composer train.py a.yaml [b.yaml ...] [key=value ...] [--dry-run]

  a.yaml      a run; several are trained one after another, each in a fresh process
  key=value   an override for every file, such as optimizer.lr=1e-4
  --dry-run   train nothing; say what each run would do, its memory and its time
"""
DRY_RUN = "--dry-run"
# What a launcher would set for a process without others.
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "NODE_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
}
USAGE_EXIT, FAILURE_EXIT = 2, 1
TRACEBACK_VARIABLE = "FOUNDRY_EXT_TRACEBACK"
TRACEBACK_HINT = f"(set {TRACEBACK_VARIABLE}=1 for the traceback)"
# llm-foundry's builders, and the part of the YAML that each one reads.
SECTIONS = {
    "build_tokenizer": "tokenizer",
    "build_scheduler": "scheduler",
    "build_logger": "loggers",
    "build_callback": "callbacks",
    "build_algorithm": "algorithms",
    "build_dataloader": "train_loader",
    "build_evaluators": "eval_loader",
    "build_composer_model": "model",
    "build_optimizer": "optimizer",
}


def main(script: str, arguments: Sequence[str]) -> int:
    """The exit code of train.py, which lies at `script` and was given `arguments`."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_EXIT
    OmegaConf.clear_resolver("oc.env")  # as llm-foundry does: a run is what its YAML says
    dry_run = DRY_RUN in arguments
    try:
        files, overrides = split_arguments([one for one in arguments if one != DRY_RUN])
        configs, complaints = check_all(files, overrides)
    except UsageError as error:
        configs, complaints = [], [str(error)]
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the other ranks find the same
        for line in complaints:
            print(f"train.py: error: {line}", file=sys.stderr)
    if not configs:
        return USAGE_EXIT
    if dry_run:
        found = plan_each(configs)
        return USAGE_EXIT if complaints else found
    if len(files) == 1:
        return train_here(*configs[0])
    if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        print(
            f"train.py: error: {len(files)} files on several nodes: each node would train by"
            " itself; give one file, and start the next one when it is done",
            file=sys.stderr,
        )
        return USAGE_EXIT
    # A file with a mistake takes its turn too: it fails at once, and the summary names it.
    return train_in_turn(script, files, overrides)


def check_all(
    files: Sequence[Path], overrides: Sequence[str]
) -> tuple[list[tuple[Path, DictConfig]], list[str]]:
    """The configurations of the files without a mistake, and a line for each of the others.

    All are looked at before the first one starts, so that a mistake in the last file is seen now
    and not tomorrow morning.
    """
    configs: list[tuple[Path, DictConfig]] = []
    complaints: list[str] = []
    for path in files:
        try:
            configs.append((path, load_config(path, overrides)))
        except UsageError as error:
            complaints.append(str(error))
    if len(configs) > 1:
        paths, loaded = zip(*configs, strict=True)
        check_several(paths, loaded, overrides)
    return configs, list(dict.fromkeys(complaints))


def train_here(path: Path, config: DictConfig) -> int:
    """One run in this process."""
    resolved = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    fault = missing_checkpoint(resolved) or unwritable(resolved)
    if fault:
        complain(path, fault)
        return USAGE_EXIT
    from composer.utils import format_name_with_dist
    from llmfoundry.command_utils import train

    from foundry_ext.checkpoints.load_path import check_load_path

    _log_without_secrets()
    try:
        if config.get("load_path") and "exact_resume" not in (config.get("callbacks") or {}):
            check_load_path(format_name_with_dist(config.load_path, str(config.get("run_name"))))
        trainer = train_recorded(train, config)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE, "0") != "0":
            raise
        known = explain(error, resolved)
        if known is None and started_training(error):
            raise
        complain(path, f"{known or describe(error, config)} {TRACEBACK_HINT}")
        return USAGE_EXIT if known is None else FAILURE_EXIT
    trainer.close()  # loggers write out what they still hold
    return 0


def _log_without_secrets() -> None:
    """llm-foundry prints the whole YAML and gives it to every logger, as it is."""
    module: Any = importlib.import_module("llmfoundry.command_utils.train")
    whole = module.log_config

    def log_config(logger: Any, config: dict[str, Any]) -> None:
        whole(logger, redact(config))

    module.log_config = log_config


def complain(path: Path, text: str) -> None:
    """On every rank: the launcher holds back what the others say and shows it if they failed."""
    rank = os.environ.get("RANK", "0")
    label = "train.py: error" if rank == "0" else f"train.py: error on rank {rank}"
    print(f"{label}: {path}: {redact(text)}", file=sys.stderr)


def plan_each(configs: Sequence[tuple[Path, DictConfig]]) -> int:
    """The plan of every run, by rank 0 alone: a plan needs no other process."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("RANK", "0") != "0":
        return 0
    os.environ.update(ALONE if num_ranks > 1 else {})
    from foundry_ext.preflight.plan.plan import plan_config  # llm-foundry: some 20 seconds
    from foundry_ext.preflight.plan.text import render

    code = 0
    for number, (path, config) in enumerate(configs):
        resolved: Any = OmegaConf.to_container(config, resolve=True)
        try:
            plan = plan_config(resolved, name=str(path), num_ranks=num_ranks)
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE, "0") != "0":
                raise
            complain(path, f"{describe(error, config)} {TRACEBACK_HINT}")
            code = USAGE_EXIT
            continue
        print("\n" * bool(number) + render(plan), flush=True)
    return code


def train_recorded(train: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """train(config); whatever ends it early is said in the run's record before it goes on."""
    try:
        return train(config)
    except BaseException as error:  # Ctrl-C and sys.exit end a run too
        from foundry_ext.records.record import mark_failed  # not for a mere check of a YAML

        path = record_path(config)
        if path is not None:
            mark_failed(path, error)
        raise


def started_training(error: BaseException) -> bool:
    """Whether Composer's fit or eval was on the stack: then the traceback is worth its length.

    Not so where a callback of ours refuses, as it begins, what the YAML says.
    """
    code = [frame.f_code for frame in _frames(error)]
    refused = isinstance(error, ValueError) and any(
        one.co_name == "fit_start" and "foundry_ext" in Path(one.co_filename).parts for one in code
    )
    return not refused and any(
        one.co_name in ("fit", "eval")
        and Path(one.co_filename).parts[-3:] == ("composer", "trainer", "trainer.py")
        for one in code
    )


def describe(error: BaseException, config: DictConfig) -> str:
    """`optimizer (decoupled_adamw): unknown key, optimizer.lrr; remove or correct it`."""
    section, name = _section(error)
    where = f"{section} ({name}): " if name else f"{section}: " if section else ""
    text = one_line(error)
    if isinstance(error, KeyError):
        return f"{where}missing key, {text}; add it"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'configuration'}: {first_line(error)}"
    _, unregistered, names = text.partition(" Available names: ")
    if unregistered:
        hint = suggest(name, names.split(", "))
        return f"{where}unknown name, {name!r}{hint or ';'} known: {names}"
    _, unexpected, rest = text.partition("unexpected keyword argument ")
    if unexpected:
        key = rest.split("'")[1]
        sections = OmegaConf.to_container(config, resolve=True)
        path = find_key(sections, key, below=section)
        if path:
            hint = suggest(key, _parameters(error)) or "; remove or correct it"
            return f"{where}unknown key, {path}{hint}"
    text = text.removesuffix(".")
    if section == "tokenizer":
        from huggingface_hub.errors import HFValidationError

        text += _TOKENIZER
        if isinstance(error, OSError | HFValidationError) and not Path(name).is_dir():
            text = f"no folder here, and the hub does not give it: {text}"
    return f"{where}{text} [{type(error).__name__}]"


_TOKENIZER = (
    "; tokenizer.name is to be a local folder with tokenizer.json and tokenizer_config.json, or a"
    " name on the hub where that can be reached"
)


def _parameters(error: BaseException) -> list[str]:
    """The keys that would have been taken where an unknown one was refused."""
    for frame in reversed(list(_frames(error))):
        constructor = frame.f_locals.get("registered_constructor")
        if callable(constructor):
            return list(inspect.signature(constructor).parameters)
    return []


def find_key(node: Any, key: str, *, below: str = "") -> str:
    """The dotted path of the first `key` in nested mappings and lists, or ''.

    `below` narrows the search to that top-level section.
    """
    if below:
        path = find_key(node.get(below), key)
        return f"{below}.{path}" if path else ""
    items = node.items() if isinstance(node, dict) else ()
    for name, child in enumerate(node) if isinstance(node, list) else items:
        if name == key:
            return str(name)
        path = find_key(child, key)
        if path:
            return f"{name}.{path}"
    return ""


def _section(error: BaseException) -> tuple[str, str]:
    """The part of the YAML being built when error was raised, and the name registered there."""
    section, name = "", ""
    for frame in _frames(error):
        found = SECTIONS.get(frame.f_code.co_name)
        if found:
            # Loaders for evaluation come from build_dataloader too.
            section = section if section == "eval_loader" else found
            name = frame.f_locals.get("name") or frame.f_locals.get("tokenizer_name") or ""
    return section, str(name)


def _frames(error: BaseException) -> Iterator[FrameType]:
    traceback = error.__traceback__
    while traceback:
        yield traceback.tb_frame
        traceback = traceback.tb_next
