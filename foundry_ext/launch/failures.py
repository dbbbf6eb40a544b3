"""One-line explanations of known failures: memory, disk, wrong GPU, no step left."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from foundry_ext.config.outputs import output_paths
from foundry_ext.utils.errors import one_line
from foundry_ext.utils.nested import get

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: BaseException, config: dict[str, Any]) -> str | None:
    """Return `what, value; way out` for a known failure, or None.

    Args:
        error: the exception that ended the run, with its causes.
        config: the run's resolved configuration.
    """
    for one in causes(error):
        text = one_line(one)
        said = shorten(text, 160, placeholder=" ...")
        if type(one).__name__ == "OutOfMemoryError":
            return f"{_memory(config)} ({said})"
        if isinstance(one, RuntimeError) and "EADDRINUSE" in text:
            return f"{_port()} ({said})"
        if type(one).__name__ == "DistStoreError" and "clients joined" in text:
            return (
                f"not all ranks have come within dist_timeout; start every node with the same"
                f" --world_size, --master_addr and --master_port ({said})"
            )
        if isinstance(one, OSError) and one.errno in _FULL:
            # exact_resume or the cache has explained it
            if "save_folder" in text or "HF_DATASETS_CACHE" in text:
                return text.partition("] ")[2]
            return (
                f"no space is left for {one.filename or 'a file of the run'}; make some, or name"
                f" another disk in {_key_of(one.filename, config)}, and start the same command"
                f" again: it continues from the last intact checkpoint ({said})"
            )
        if isinstance(one, FloatingPointError):  # of guard and weight_checks, which explain it
            return text
        if "can't allocate memory" in text:
            return (
                "this machine's memory cannot hold what the run needs; `foundry-ext plan` says how"
                f" much that is ({said})"
            )
        if "no kernel image is available" in text:
            return (
                "this GPU is not one that the installed torch was built for; `make install"
                " WORLD=current` has kernels for newer cards, see CONTRIBUTING.md, Two worlds"
                f" ({said})"
            )
        if "No training would occur" in text:  # of Composer's, where exact_resume is not used
            return (
                f"max_duration, {config.get('max_duration')}: the loaded checkpoint has reached it,"
                " so no step is left; extend max_duration, or add callbacks.exact_resume, with"
                f" which a finished run repeats its last evaluation and its export ({said})"
            )
        if "FlashAttention only supports" in text:
            backend = get(config, "model.attention_backend") or "auto"
            return (
                f"model.attention_backend, {backend!r}, does not run on this GPU; set it to flex,"
                f" or to sdpa, which runs anywhere ({said})"
            )
    return None


def _port() -> str:
    return (
        f"port {os.environ.get('MASTER_PORT')} is in use by another program; name a free one with"
        " `composer --master_port`, the same on all nodes, or on a single node leave it out"
    )


def _key_of(path: str | None, config: dict[str, Any]) -> str:
    """Return the key of the output that the path is or lies in; save_folder if it is in none."""
    for key, place in output_paths(config).items():
        if path is not None and Path(path).absolute().is_relative_to(place.absolute()):
            return key
    return "save_folder"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the errors that caused it."""
    while error is not None:
        yield error
        hidden = error.__suppress_context__  # `raise ... from`
        error = error.__cause__ if hidden else error.__context__


def _memory(config: dict[str, Any]) -> str:
    """Explain a GPU that ran out of memory.

    The tokens of a pack decide what a step needs; a microbatch above 1 is several packs at once.
    """
    place = "train_loader.dataset.pack_tokens"
    longest = get(config, "train_loader.dataset.max_seq_len") or config["max_seq_len"]
    tokens = get(config, "train_loader.dataset.pack_tokens") or longest
    packs = config.get("device_train_microbatch_size")
    several = isinstance(packs, int) and packs > 1
    failed, most = f"GPU out of memory with {place} {tokens}", _most_that_fit(config)
    if several:
        failed = f"GPU out of memory with device_train_microbatch_size {packs} packs of {tokens}"
        if most is None or most >= tokens:
            return (
                f"{failed} tokens; set device_train_microbatch_size to 1 and, if that is not"
                f" enough, {place} to {max(tokens // 2, longest)}"
            )
    less = tokens // 2
    while most is not None and less > max(most, 2):
        less //= 2
    if less >= longest:
        change = f"set device_train_microbatch_size to 1 and {place} to" if several else "try"
        batch = config.get("global_train_batch_size")
        as_many = f" {batch * (tokens // less)}" if isinstance(batch, int) else ""
        return (
            f"{failed}; {change} {less}, and global_train_batch_size{as_many} to keep the tokens"
            " of a step, or set model.activation_checkpointing: true; `foundry-ext plan` says what"
            " fits"
        )
    return (
        f"{failed}, and documents have up to max_seq_len {longest}; set"
        " model.activation_checkpointing: true, or pack_tokens and max_seq_len to"
        f" {max(min(less, longest // 2), 2)}; `foundry-ext plan` says what fits"
    )


def _most_that_fit(config: dict[str, Any]) -> int | None:
    """Return the most tokens of a pack that fit this GPU by the plan's estimate, if there is one.

    There is none for a model that FSDP shards.
    """
    if config.get("fsdp_config"):
        return None
    with contextlib.suppress(Exception):  # the explanation of another error is no place for one
        import torch

        from foundry_ext.preflight.plan.fitting import largest_pack_tokens

        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return largest_pack_tokens(config, memory)
    return None


def unwritable(config: dict[str, Any]) -> str | None:
    """Return an error for the first output path that cannot be written, or None.

    A temporary file is created in the nearest folder that exists; nothing remains.
    """
    for key, path in output_paths(config).items():
        place = str(path)
        folder = next(one for one in path.absolute().parents if one.exists())
        try:
            if path.exists() and key.endswith("folder"):
                folder = path
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            return (
                f"{key}, {place!r}, cannot be written: {folder}: {reason}; name a folder that can"
            )
    return None


def missing_checkpoint(config: dict[str, Any]) -> str | None:
    """Return an error for a `load_path` on this disk that does not exist, or None.

    A path with {rank} is left to Composer.
    """
    path = config.get("load_path")
    if not isinstance(path, str) or "://" in path or "{" in path or Path(path).exists():
        return None
    return f"load_path, {path!r}: no such checkpoint (in {Path.cwd()}); correct it or leave it out"
