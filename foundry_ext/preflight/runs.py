"""Preflight of a run that a YAML file and overrides describe.

Nothing slow is imported before the file has been checked.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from foundry_ext.config.automatic import compiles_on_gpu, settle
from foundry_ext.config.loading import load_config
from foundry_ext.utils.environment import has_gpu
from foundry_ext.utils.progress import announce

if TYPE_CHECKING:
    from foundry_ext.preflight.inspect.packs import Inspection
    from foundry_ext.preflight.plan.plan import Plan
    from foundry_ext.preflight.verify.verify import Verification


def plan_run(path: Path | str, overrides: Sequence[str] = (), *, num_ranks: int = 1) -> "Plan":
    """Estimate a run's steps, tokens, memory and time without training.

    Args:
        path: the YAML file.
        overrides: `key=value` texts, such as "optimizer.lr=1e-4".
        num_ranks: processes, one device each, that will train the run.

    Raises:
        UserError: the configuration is wrong, or the run cannot be planned.
    """
    loaded = load_config(path, overrides)
    compiled = compiles_on_gpu(loaded)
    config = checked(loaded)
    from foundry_ext.preflight.plan.plan import plan_config

    return plan_config(config, name=str(path), num_ranks=num_ranks, compiles_on_gpu=compiled)


def inspect_run(
    path: Path | str, overrides: Sequence[str] = (), *, loader: str = "train", num_packs: int = 4
) -> "Inspection":
    """Return the first packs of a run as the model receives them, and the totals of an epoch.

    The epoch is also counted padded and unpadded, with the speed that each layout would have.

    Args:
        path: the YAML file.
        overrides: `key=value` texts.
        loader: "train" or "eval"; of several eval loaders the first.
        num_packs: packs to return.

    Raises:
        UserError: the configuration is wrong, or the loader does not pack.
    """
    config = checked(load_config(path, overrides))
    from foundry_ext.preflight.inspect.packs import inspect_config
    from foundry_ext.preflight.plan.layouts import predict_speeds

    return inspect_config(
        config,
        name=str(path),
        loader=loader,
        num_packs=num_packs,
        predict=lambda layouts, train: predict_speeds(layouts, config, train),
    )


def verify_run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    steps: int = 4,
    packs: int = 2,
    tokens: int = 512,
) -> "Verification":
    """Check a run's packing and resumption on its own model and data, for a few steps.

    Args:
        path: the YAML file.
        overrides: `key=value` texts.
        steps: optimizer steps of the uninterrupted run; another run is stopped halfway.
        packs: packs that are compared with their documents.
        tokens: tokens of a pack, at most.

    Raises:
        UserError: the configuration is wrong, or the run cannot be verified.
    """
    config = checked(load_config(path, overrides))
    from foundry_ext.preflight.verify.verify import verify_config

    return verify_config(config, name=str(path), steps=steps, packs=packs, tokens=tokens)


def checked(loaded: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration; its components' names and keys are known to be right."""
    announce("loading torch and llm-foundry")
    settle(loaded, has_gpu=has_gpu())
    config: Any = OmegaConf.to_container(loaded, resolve=True)
    from foundry_ext.preflight.components import check_components

    check_components(config)
    return config
