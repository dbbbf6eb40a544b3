"""Checks of a run's data against its model and its evaluations, made before training."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from composer.core import Evaluator
from composer.utils import dist
from numpy.typing import NDArray

from foundry_ext.data.dataset import PackedDataset
from foundry_ext.data.overlap import find_overlap
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

MOST_COMPARED = 2**28
"""Prepared training tokens that are read at every start to compare them with an evaluation."""
# Honest data repeat a few short rows, which have few tokens. Overlapping slices share rows of every
# length, so their share of the tokens is that of the rows.
MOST_TRAINED = 0.1
"""Share of an evaluation's tokens that may be in documents of the training data."""


def evaluated_datasets(evaluators: Iterable[Evaluator]) -> Iterator[tuple[str, PackedDataset]]:
    """Yield (label, dataset) of the evaluators that have a packed loader."""
    for evaluator in evaluators:
        dataset = getattr(evaluator.dataloader.dataloader, "dataset", None)
        if isinstance(dataset, PackedDataset):
            yield evaluator.label, dataset


def check_positions(
    dataset: PackedDataset, positions: int | None, loader: str = "train_loader"
) -> None:
    """Refuse data whose documents may be longer than the model has positions.

    Raises:
        UserError: they may; names both numbers and the way out.
    """
    longest = dataset.collator.max_seq_len
    if positions is not None and longest > positions:
        raise UserError(
            f"{loader}.dataset.max_seq_len: {longest} is more than the model's {positions}"
            f" positions; lower it (variables.max_seq_len={positions} where the YAML has that), or"
            " raise model.config_overrides.max_position_embeddings and let training teach the model"
            " the new positions"
        )


def refuse_training_documents(
    key: str,
    evaluated: PackedDataset,
    trained: PackedDataset,
    indices: NDArray[np.integer] | None = None,
) -> None:
    """Refuse an evaluation on documents that are trained on, and warn of a few.

    A few are less than `MOST_TRAINED` of the evaluation's tokens.

    Args:
        key: the evaluation's key, for the message.
        evaluated: its data.
        trained: the training data.
        indices: documents of `evaluated` that are measured; None for all.

    Raises:
        UserError: there are more; names `key`, their number and one of them.
    """
    way_out = _way_out(evaluated)
    if evaluated.documents.fingerprint == trained.documents.fingerprint:
        raise UserError(f"{key}: its documents are those of train_loader; {way_out}")
    if shared := _shared_shards(evaluated, trained):
        raise UserError(f"{key}: {shared} of its shards are those of train_loader; {way_out}")
    if not _can_compare(trained):
        if dist.get_global_rank() == 0:
            log.warning(
                "%s: its documents are not compared with those of train_loader, which is prepared"
                " data in another place, or more than %d tokens; hold them out (`holdout`) when you"
                " prepare it",
                *(key, MOST_COMPARED),
            )
        return
    overlap = find_overlap(evaluated, trained, indices)
    if not overlap.documents:
        return
    found = (
        f"{key}: {overlap.documents} of its {overlap.of_documents} documents,"
        f" {100 * overlap.share:.1f} % of its tokens, are in train_loader too"
        f" ({overlap.example}); {way_out}"
    )
    if overlap.share >= MOST_TRAINED:
        raise UserError(found)
    if dist.get_global_rank() == 0:
        log.warning("%s, or leave these few where they are", found)


def _shared_shards(evaluated: PackedDataset, trained: PackedDataset) -> int:
    """Return how many shards both have, if both are prepared."""
    keys = [
        {shard.key for source in dataset.documents.sources for shard in source.index.shards}
        if isinstance(dataset.documents, PreparedDocuments)
        else set()
        for dataset in (evaluated, trained)
    ]
    return len(keys[0] & keys[1])


def _can_compare(trained: PackedDataset) -> bool:
    """Return whether all training documents can be read at every start."""
    documents = trained.documents
    if not isinstance(documents, PreparedDocuments):
        return True
    is_here = all(source.files.local is None for source in documents.sources)
    return is_here and documents.num_tokens <= MOST_COMPARED


def _way_out(evaluated: PackedDataset) -> str:
    """Return how to evaluate on other documents; streams have no `holdout`."""
    if evaluated.describe_sources("name") == "streams":
        return "evaluate on a stream with other rows, or set eval_interval: 0"
    return "evaluate on held-out ones (`holdout` in both loaders, or another file)"


def check_data(
    trained: PackedDataset, evaluators: Iterable[Evaluator], config: Any, *, evaluates: bool
) -> None:
    """Check the data of training and evaluation against the model and each other.

    Args:
        trained: the training data.
        evaluators: Composer's evaluators.
        config: the model's configuration.
        evaluates: false if the evaluators are never run.

    Raises:
        UserError: documents may be longer than the model has positions, or a run is evaluated on
            documents that it is trained on.
    """
    positions = getattr(config, "max_position_embeddings", None)
    check_positions(trained, positions)
    for label, evaluated in evaluated_datasets(evaluators) if evaluates else ():
        check_evaluation_data(label, evaluated, trained, positions)


def check_evaluation_data(
    label: str, evaluated: PackedDataset, trained: PackedDataset, positions: int | None
) -> None:
    """Check one evaluation loader, named by its label, as `check_data` does."""
    key = f"eval_loader {label.removeprefix('eval/')}"
    check_positions(evaluated, positions, key)
    refuse_training_documents(key, evaluated, trained)
