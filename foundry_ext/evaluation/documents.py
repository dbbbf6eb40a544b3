"""Held-out documents: summed loss of each, and KL to the base model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.evaluation.config import DocumentsSettings
from foundry_ext.evaluation.metrics import Item
from foundry_ext.evaluation.scoring import Shard, evenly_spaced, score_documents
from foundry_ext.models.scores import BaseModel
from foundry_ext.models.smollm2 import SmolLM2ForCausalLM
from foundry_ext.utils.errors import UserError


class DocumentsSet:
    """The documents of a packed loader, which tokenises and labels them as training would.

    Raises:
        UserError: no packed loader, or what the loader itself refuses.
    """

    def __init__(self, settings: DocumentsSettings, tokenizer: PreTrainedTokenizerBase):
        self.settings = settings
        # Heavy, and only this kind of set needs it: it imports llm-foundry.
        from foundry_ext.data import dataloader as packed

        builders = {
            "packed_finetuning": packed.build_packed_finetuning_dataloader,
            "packed_text": packed.build_packed_text_dataloader,
        }
        loader: dict[str, Any] = dict(settings.loader)
        name = loader.pop("name", None)
        if name not in builders:
            raise UserError(
                f"sets.{settings.name}.loader.name: {name!r}; choose one of {', '.join(builders)}"
            )
        # Batches are not used, only documents and the collator.
        loader |= {"drop_last": False, "num_workers": 0}
        spec = builders[name](tokenizer=tokenizer, device_batch_size=1, **loader)
        dataset: Any = spec.dataloader
        self.dataset: packed.PackedDataset = dataset.dataset
        used = self.dataset.sampler.used
        self.indices = used[evenly_spaced(len(used), settings.max_documents)]

    @property
    def description(self) -> dict[str, Any]:
        """For the run record: which data this was."""
        documents, chosen = self.dataset.documents, self.indices
        return {
            "name": self.dataset.describe_sources("name"),
            "revision": self.dataset.describe_sources("revision"),
            "fingerprint": documents.fingerprint,
            "documents": len(chosen),
            "tokens": int(documents.lengths[chosen].sum()),
            "counts": documents.counts,
        }

    def measure(
        self, model: SmolLM2ForCausalLM, base: BaseModel | None, shard: Shard
    ) -> list[Item]:
        """A line a document of this rank's share; `kl` where the set asks for it and a base is
        given."""
        dataset, wants_kl = self.dataset, self.settings.kl and base is not None
        scores = score_documents(
            model,
            self.indices,
            dataset.documents.lengths[self.indices].astype(np.int64),
            lambda chosen: dataset[np.asarray(chosen)],
            capacity=dataset.sampler.capacity,
            base=base if wants_kl else None,
            shard=shard,
        )
        return [
            {
                "item": str(score.index),
                "loss": -score.log_prob,
                "tokens": score.num_tokens,
                **({"kl": score.kl} if wants_kl else {}),
            }
            for score in scores
        ]

    def complete(self, gathered: Sequence[Item]) -> list[Item]:
        """The lines of all ranks in the order of the data."""
        return sorted(gathered, key=lambda item: int(item["item"]))
