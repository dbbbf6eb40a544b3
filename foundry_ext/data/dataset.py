"""Packed dataset, and a DataLoader whose position can be checkpointed."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from composer.utils import reproducibility
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from foundry_ext import __version__
from foundry_ext.data.documents import Documents
from foundry_ext.data.mixture import MixedDocuments
from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.data.prepared.loading import window_sampler
from foundry_ext.data.ranks import check_same
from foundry_ext.packing.batch import Pack
from foundry_ext.packing.collator import PackCollator
from foundry_ext.packing.sampler import PackedBatchSampler
from foundry_ext.utils.constants import NEW_RUN
from foundry_ext.utils.errors import UserError


class PackedDataset(Dataset):
    """Documents by pack, and the position that training has reached in them.

    Composer saves `state_dict` and restores `load_state_dict` of a loader's dataset, never of its
    sampler, so the batch number is kept here. Resuming reads no document to skip it.

    Args:
        sampler_settings: arguments of PackedBatchSampler.
        description: one dict per source of `documents`: name, split, revision, documents, tokens,
            counts; for the run's record.
    """

    def __init__(
        self,
        documents: Documents | MixedDocuments | PreparedDocuments,
        collator: PackCollator,
        sampler_settings: dict[str, Any],
        description: Sequence[dict[str, Any]] = (),
    ):
        self.documents, self.collator, self.description = documents, collator, list(description)
        self.num_documents = documents.num_used
        self.sampler = (
            window_sampler(self, documents, **sampler_settings)
            if isinstance(documents, PreparedDocuments)
            else PackedBatchSampler(self, documents.lengths, **sampler_settings)
        )
        self.epoch, self.next_batch = 0, 0
        self.pending_rng: Any = None

    def __len__(self) -> int:
        """Return the number of documents in use, which are Composer's samples of an epoch."""
        return self.num_documents

    def __getitem__(self, pack: NDArray[np.int64]) -> Pack:
        return self.documents.pack(pack, self.collator)

    def describe_sources(self, key: str) -> str | None:
        """Return the `name` or the `revision` of the source; those of a mixture are joined."""
        values = [str(source[key]) for source in self.description if source.get(key) is not None]
        return " + ".join(values) or None

    def name_document(self, index: int) -> str:
        """Return `document 17 of data/train.jsonl`.

        Documents are counted from 0 in the order of the source's rows. A row that `overlong: split`
        has split counts as several documents.
        """
        source, row = self.documents.locate(index)
        suffix = f" of {self.description[source]['name']}" if self.description else ""
        return f"document {row}{suffix}"

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of all settings that decide the plan, ranks excluded."""
        sampler, data = self.sampler, self.documents.plan_fingerprint
        return f"{data}-{sampler.capacity}-{sampler.seed}-{sampler.shuffle:d}"

    def compare_ranks(self) -> None:
        """Check that all ranks, which must call this together, have the same plan.

        Raises:
            UserError: a setting, the data or the packs differ; names it, and two nodes.
        """
        if self.sampler.num_replicas == 1:
            return
        sampler, sources = self.sampler, self.description
        items: dict[str, Any] = {
            "max_seq_len": self.collator.max_seq_len,
            "pack_tokens": sampler.capacity,
            "shuffle": sampler.shuffle,
            "shuffle_seed": sampler.seed,
            "drop_last": sampler.drop_last,
            "packs per batch of a rank": sampler.batch_packs,
        }
        fingerprints = self.documents.source_fingerprints()
        for index, (source, fingerprint) in enumerate(zip(sources, fingerprints, strict=True)):
            key = "the data" if len(sources) == 1 else f"the data of datasets[{index}]"
            counts = f"{source['documents']} documents, {source['tokens']} tokens"
            items[f"{key} (digest)"] = f"{fingerprint}: {counts}"
        items["the packs (digest)"] = f"{self.documents.fingerprint}-{sampler.plan_digest(0)}"
        names = self.describe_sources("name")
        check_same(items, f"give all nodes the same rows in {names}, and the same dataset settings")

    def state_dict(self, num_samples: int | None = None, from_beginning: bool = True) -> dict:
        """Return the position of the next batch; Composer's `num_samples` is not needed."""
        return {
            "epoch": self.epoch,
            "batch": self.next_batch,
            "order": "shuffled" if self.sampler.shuffle else "as given",
            "global_batch_packs": self.sampler.batch_packs * self.sampler.num_replicas,
            "fingerprint": self.fingerprint,
            "plan": self.sampler.plan_digest(self.epoch) if self.next_batch else None,
            "rng": reproducibility.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue where `state` was saved, on any number of ranks with a batch boundary there.

        Raises:
            UserError: it was saved with another loader, other data, other packs in its epoch,
                inside a global batch of this size, or by a version with another order.
        """
        if state is None:
            # Composer would assume that the position was restored, and skip no batches itself.
            raise UserError(
                "the checkpoint was made with another loader and does not store its position in the"
                f" data; restore that loader; {NEW_RUN}"
            )
        self._check_same_plan(state)
        packs = state["batch"] * state["global_batch_packs"]
        batch, rest = divmod(packs, self.sampler.batch_packs * self.sampler.num_replicas)
        if rest:
            raise UserError(
                f"the checkpoint ends after {packs} packs, inside a global batch of"
                f" {self.sampler.batch_packs} x {self.sampler.num_replicas}; restore its batch size"
            )
        if state["plan"] not in (None, self.sampler.plan_digest(state["epoch"])):
            # The batch size decides whether an epoch reuses the first one's packs, see the sampler.
            raise UserError(
                f"the checkpoint ends inside epoch {state['epoch']}, which has other packs under"
                " this global batch size or numpy version; restore those of the checkpoint"
            )
        self.epoch, self.next_batch = state["epoch"], batch
        self.sampler.resume_at(epoch=self.epoch, batch=batch)
        # At an epoch's start Composer restores the random state itself.
        self.pending_rng = state["rng"] if batch else None

    def _check_same_plan(self, state: dict[str, Any]) -> None:
        saved, current = state["fingerprint"], self.fingerprint
        by_earlier_version = "order" not in state
        if _plan_of(saved) != _plan_of(current):
            hint = ""
            if by_earlier_version and saved.rsplit("-", 3)[0] != current.rsplit("-", 3)[0]:
                hint = (
                    ". If data and YAML are unchanged, finish the run with the earlier version that"
                    f" began it: foundry_ext {__version__} adds a tokenizer's special tokens once"
                    " per document, and closes a chat once"
                )
            data = self.describe_sources("name") or "the data"
            raise UserError(
                "the checkpoint was made with other data or packing"
                f" ({describe_change(saved, current)}); restore {data} and the YAML;"
                f" {NEW_RUN}{hint}"
            )
        if by_earlier_version and not self.sampler.shuffle:
            raise UserError(
                "the checkpoint was made by an earlier version, which shuffled the documents once"
                f" under shuffle: false; foundry_ext {__version__} keeps their order, so the run"
                " would not continue as it began; finish it with the version that began it;"
                f" {NEW_RUN}"
            )

    def restore_rng(self) -> None:
        """Restore, once, the random state that `load_state_dict` received."""
        if self.pending_rng is not None:
            reproducibility.load_rng_state(self.pending_rng)
            self.pending_rng = None


class PackedDataLoader(DataLoader):
    """Loader of lists of packs that keeps the dataset's position up to date.

    Composer restores the random state when it skips batches, but not when a dataset resumes itself;
    dropout would then differ from the uninterrupted run. So it is restored here, right before the
    first batch, where an uninterrupted run had it.
    """

    dataset: PackedDataset

    def __init__(self, dataset: PackedDataset, **kwargs: Any):
        super().__init__(
            dataset,
            batch_sampler=dataset.sampler,
            collate_fn=_same,
            # An iterator draws a seed; its own generator keeps the model's undisturbed.
            generator=torch.Generator().manual_seed(dataset.sampler.seed),
            **kwargs,
        )

    def __iter__(self) -> Iterator[list[Pack]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dataset, sampler = self.dataset, self.dataset.sampler
        dataset.epoch, dataset.next_batch = sampler.epoch, sampler.first_batch
        if dataset.next_batch == 0:
            dataset.pending_rng = None
        try:
            for batch in super().__iter__():
                dataset.next_batch += 1
                dataset.restore_rng()
                yield batch
        except UserError as error:  # that of a worker process has a traceback before its text
            raise UserError(str(error).rpartition("UserError: ")[2]) from error
        dataset.restore_rng()  # the epoch had no batch left
        dataset.epoch, dataset.next_batch = sampler.epoch + 1, 0


def _plan_of(fingerprint: str) -> list[str]:
    """Return what decides the packs: the seed does not, if nothing is shuffled."""
    parts = fingerprint.rsplit("-", 3)
    return [*parts[:2], parts[3]] if parts[3:] == ["0"] else parts


def describe_change(saved: str, current: str) -> str:
    """Return `pack_tokens: 64, now 96` for two fingerprints of PackedDataset."""
    names = ("documents' tokens and labels", "window", "pack_tokens", "shuffle_seed", "shuffle")
    pairs = zip(names, _parts_of(saved), _parts_of(current), strict=True)
    return "; ".join(f"{name}: {old}, now {new}" for name, old, new in pairs if old != new)


def _parts_of(fingerprint: str) -> list[str]:
    data, *rest = fingerprint.rsplit("-", 3)
    documents, _, window = data.partition(" window ")
    return [documents, window or "none", *rest]


def _same(packs: list[Pack]) -> list[Pack]:
    return packs
