"""Held-out documents, measured by the loss of each and its KL to the base model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.prepared.documents import PreparedDocuments
from foundry_ext.evaluation.config import DocumentsSetConfig
from foundry_ext.evaluation.metrics import Item
from foundry_ext.evaluation.scoring import Shard, evenly_spaced, score_documents
from foundry_ext.models.scores import BaseStates
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError


class DocumentsSet:
    """Documents of a packed loader, tokenised and labelled as in training.

    Raises:
        UserError: the loader is not a packed one, or refuses its own settings.
    """

    def __init__(self, config: DocumentsSetConfig, tokenizer: PreTrainedTokenizerBase):
        self.config = config
        # Slow to import because of llm-foundry, and only this kind of set needs it.
        from foundry_ext.data import dataloader as packed

        builders = {
            "packed_finetuning": packed.build_packed_finetuning_dataloader,
            "packed_text": packed.build_packed_text_dataloader,
        }
        loader: dict[str, Any] = dict(config.loader)
        name = loader.pop("name", None)
        if name not in builders:
            raise UserError(
                f"sets.{config.name}.loader.name: {name!r}; choose one of {', '.join(builders)}"
            )
        # Only the documents and the collator are used, never the loader's batches.
        loader |= {"drop_last": False, "num_workers": 0}
        spec = builders[name](tokenizer=tokenizer, device_batch_size=1, **loader)
        dataloader: Any = spec.dataloader
        self.dataset: packed.PackedDataset = dataloader.dataset
        if isinstance(self.dataset.documents, PreparedDocuments):
            raise UserError(
                f"sets.{config.name}.loader.dataset.prepared: a set's documents are measured one by"
                " one; name their rows in hf_name"
            )
        self.documents = self.dataset.documents
        (used,) = self.documents.used_documents()
        self.indices = used[evenly_spaced(len(used), config.max_documents)]

    @property
    def description(self) -> dict[str, Any]:
        """Identity of the data, for the run's record."""
        documents = self.documents
        return {
            "name": self.dataset.describe_sources("name"),
            "revision": self.dataset.describe_sources("revision"),
            "fingerprint": documents.fingerprint,
            "documents": len(self.indices),
            "tokens": int(documents.lengths[self.indices].sum()),
            "counts": documents.counts,
        }

    @property
    def digest(self) -> str:
        """Digest of the documents; those that are measured follow from it and from the settings."""
        return self.documents.fingerprint

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseStates | None, shard: Shard
    ) -> list[Item]:
        """Return an item per document of this rank's shard.

        `kl` is measured if the set asks for it and there is a base model.
        """
        dataset, measures_kl = self.dataset, self.config.kl and base is not None
        scores = score_documents(
            model,
            self.indices,
            self.documents.lengths[self.indices].astype(np.int64),
            lambda indices: dataset[np.asarray(indices)],
            name=self.config.name,
            capacity=dataset.sampler.capacity,
            base=base if measures_kl else None,
            shard=shard,
        )
        return [
            {
                "item": str(score.index),
                "loss": -score.log_prob,
                "tokens": score.num_tokens,
                **({"kl": score.kl} if measures_kl else {}),
            }
            for score in scores
        ]

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """Return the items of all ranks in the order of the data."""
        return sorted(gathered, key=lambda item: int(item["item"]))
