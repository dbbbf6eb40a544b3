"""Documents by pack, and a loader of them that knows its place: what Composer saves and resumes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from composer.utils import reproducibility
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from foundry_ext.data.documents import Documents
from foundry_ext.data.mixture import MixedDocuments
from foundry_ext.packing.batch import Pack
from foundry_ext.packing.collator import PackCollator
from foundry_ext.packing.sampler import PackedBatchSampler
from foundry_ext.utils.errors import UserError


class PackedDataset(Dataset):
    """Documents by pack, and how far training has come in them.

    Composer saves `state_dict` and restores `load_state_dict` of a loader's dataset, never of its
    sampler, so the batch number is kept here. Documents are never read to skip them.
    """

    def __init__(
        self,
        documents: Documents | MixedDocuments,
        collator: PackCollator,
        sampler_settings: dict[str, Any],
        description: Sequence[dict[str, Any]] = (),
    ):
        """
        Args:
            sampler_settings: those of PackedBatchSampler.
            description: a dict for each source of `documents`: name, split, revision, documents,
                tokens, counts; for the record of a run.
        """
        self.documents, self.collator, self.description = documents, collator, list(description)
        self.num_documents = int(np.count_nonzero(documents.lengths))
        self.sampler = PackedBatchSampler(self, documents.lengths, **sampler_settings)
        self.epoch, self.next_batch = 0, 0
        self.pending_rng: Any = None

    def __len__(self) -> int:
        """Documents in use: Composer's samples of an epoch."""
        return self.num_documents

    def __getitem__(self, pack: NDArray[np.int64]) -> Pack:
        return self.collator(self.documents.read(pack))

    def describe_sources(self, key: str) -> str | None:
        """The `name`, or the `revision`, of the source; of a mixture, those of all, joined."""
        values = [str(one[key]) for one in self.description if one.get(key) is not None]
        return " + ".join(values) or None

    def name_document(self, index: int) -> str:
        """`document 17 of data/train.jsonl`: counted from 0 in the order of its source's rows, of
        which one that `overlong` split has several."""
        source, number = self.documents.locate(index)
        of = f" of {self.description[source]['name']}" if self.description else ""
        return f"document {number}{of}"

    @property
    def fingerprint(self) -> str:
        """Of the data and of all that decides the plan, ranks excluded."""
        sampler = self.sampler
        return f"{self.documents.fingerprint}-{sampler.capacity}-{sampler.seed}-{sampler.shuffle:d}"

    def state_dict(self, num_samples: int | None = None, from_beginning: bool = True) -> dict:
        """The batch that comes next; `num_samples`, which counts documents, is of no use here."""
        return {
            "epoch": self.epoch,
            "batch": self.next_batch,
            "global_batch_packs": self.sampler.batch_packs * self.sampler.num_replicas,
            "fingerprint": self.fingerprint,
            "plan": self.sampler.plan_digest(self.epoch) if self.next_batch else None,
            "rng": reproducibility.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Goes on where `state` was saved, on any number of ranks that meets at a batch's end.

        Raises:
            UserError: saved with another loader, other data, other packs in the epoch at hand, or
                between the batches of this global batch size.
        """
        if state is None:
            # Composer takes it that the place was found again, and skips no batches itself.
            raise UserError(
                "the checkpoint was made with another loader and does not say where in the data it"
                " ends; restore that loader, or start anew with load_weights_only: true"
            )
        if state["fingerprint"] != self.fingerprint:
            changed = describe_change(state["fingerprint"], self.fingerprint)
            raise UserError(
                f"the checkpoint was made with other data or packing ({changed}); restore the YAML,"
                " or start anew with load_weights_only: true"
            )
        packs = state["batch"] * state["global_batch_packs"]
        batch, rest = divmod(packs, self.sampler.batch_packs * self.sampler.num_replicas)
        if rest:
            raise UserError(
                f"the checkpoint ends after {packs} packs, which is inside a global batch of"
                f" {self.sampler.batch_packs} x {self.sampler.num_replicas}; restore its batch size"
            )
        if state["plan"] not in (None, self.sampler.plan_digest(state["epoch"])):
            # The batch size decides whether an epoch has the first one's packs, see the sampler.
            raise UserError(
                f"the checkpoint ends inside epoch {state['epoch']}, which has other packs under"
                " this global batch size or numpy; restore those of the checkpoint"
            )
        self.epoch, self.next_batch = state["epoch"], batch
        self.sampler.resume_at(epoch=self.epoch, batch=batch)
        # At an epoch's start Composer restores the random state itself.
        self.pending_rng = state["rng"] if batch else None

    def restore_rng(self) -> None:
        """Once, the random state that `load_state_dict` was given."""
        if self.pending_rng is not None:
            reproducibility.load_rng_state(self.pending_rng)
            self.pending_rng = None


class PackedDataLoader(DataLoader):
    """Yields lists of packs and keeps the dataset's place.

    Composer restores the random state when it skips batches, but not when a dataset resumes itself;
    dropout would then differ from the run that was not interrupted. So it is restored here, right
    before the first batch, which is where an uninterrupted run had it.
    """

    dataset: PackedDataset

    def __init__(self, dataset: PackedDataset, **kwargs: Any):
        super().__init__(
            dataset,
            batch_sampler=dataset.sampler,
            collate_fn=_same,
            # Its own generator: an iterator draws a seed, which must not disturb the model's.
            generator=torch.Generator().manual_seed(dataset.sampler.seed),
            **kwargs,
        )

    def __iter__(self) -> Iterator[list[Pack]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dataset, sampler = self.dataset, self.dataset.sampler
        dataset.epoch, dataset.next_batch = sampler.epoch, sampler.first_batch
        if dataset.next_batch == 0:
            dataset.pending_rng = None
        for batch in super().__iter__():
            dataset.next_batch += 1
            dataset.restore_rng()
            yield batch
        dataset.restore_rng()  # where no batch was left in the epoch
        dataset.epoch, dataset.next_batch = sampler.epoch + 1, 0


def describe_change(saved: str, found: str) -> str:
    """`pack_tokens: 64, now 96` of two fingerprints of PackedDataset."""
    names = ("documents' tokens and labels", "pack_tokens", "shuffle_seed", "shuffle")
    pairs = zip(names, saved.rsplit("-", 3), found.rsplit("-", 3), strict=False)
    return "; ".join(f"{name}: {old}, now {new}" for name, old, new in pairs if old != new)


def _same(packs: list[Pack]) -> list[Pack]:
    return packs
