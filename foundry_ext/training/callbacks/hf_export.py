"""`hf_export`: writes the trained model as a Hugging Face folder, ready to load or upload."""

import errno
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from foundry_ext.checkpoints.export import write_folder
from foundry_ext.checkpoints.files import is_disk_full
from foundry_ext.checkpoints.model_card import CARD, may_be_replaced, weights_in, write_card
from foundry_ext.checkpoints.provenance import EXPORT_MARK, Provenance
from foundry_ext.config.outputs import EXPORT
from foundry_ext.training.callbacks.run_record import RunRecord
from foundry_ext.training.meter import unwrapped
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.training.refusals import on_rank_zero
from foundry_ext.training.run_description import find_callback
from foundry_ext.training.run_files import run_files
from foundry_ext.training.weight_checks import check_final_weights
from foundry_ext.utils.atomic import replaced_folder
from foundry_ext.utils.errors import UserError

log = logging.getLogger(__name__)

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")


class HFExport(Callback):
    """Callback that writes the full model in fp32, or the adapter only, at the end of training.

    The model card, README.md, is written with the weights. The run's last evaluation comes later,
    so the card is written again, with its figures, when `run_record` has ended the record.

    Args:
        folder: where to write; `{run_name}` is replaced. Only an earlier export of the same run is
            overwritten, and not if its card has been edited.
    """

    def __init__(self, folder: str):
        self.folder = folder

    def init(self, state: State, logger: Logger) -> None:
        self.path = run_files(state).add(EXPORT, self.folder, check=self._check)

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a folder in use or a disk without room before the training, not after it."""
        run_files(state).settle(state)

    def _check(self, state: State) -> None:
        self._check_folder()
        needed = _needed_bytes(unwrapped(state))
        place = self.path.absolute()
        free = shutil.disk_usage(next(x for x in (place, *place.parents) if x.exists())).free
        if free < needed:
            raise UserError(
                f"{EXPORT}: {self.path} needs {needed / 1e9:.2f} GB, and its disk has"
                f" {free / 1e9:.2f} GB free; make room, or name a folder on another disk"
            )

    def _check_folder(self) -> None:
        """Refuse to replace what this callback did not write.

        Raises:
            UserError: names a file that is there.
        """
        if not self.path.exists():
            return
        there = sorted(self.path.iterdir()) if self.path.is_dir() else []
        mark = self.path / EXPORT_MARK
        if not self.path.is_dir() or (there and mark not in there):
            raise UserError(
                f"{EXPORT}: {self.path} exists and is not an earlier export; name another folder"
                " or remove it"
            )
        written = mark.read_text(encoding="utf-8").split("\n") if there else []
        card = self.path / CARD
        if card in there and not may_be_replaced(card):
            raise UserError(
                f"{EXPORT}: {card} has been edited since the export, and would be replaced; name"
                " another folder, or move that file away"
            )
        others = [path.name for path in there if not _is_ours(path, written)]
        if others:
            raise UserError(
                f"{EXPORT}: {self.path} holds {others[0]}, which no export wrote, and would be"
                " replaced with all that is in it; name another folder, or move that file away"
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        """Export the model. A collective.

        Raises:
            FloatingPointError: its weights are not finite.
        """
        check_final_weights(state)
        model = unwrapped(state)
        assert isinstance(model, ComposerSmolLM2), type(model)
        # On every rank because it is a collective under FSDP; rank 0 gets the result.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model.model, options=options)
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # once gathered from shards, it is a second copy
        record: RunRecord | None = find_callback(state, RunRecord)
        self.provenance = Provenance(
            record=None if record is None else record.record,
            step=state.timestamp.batch.value,
            real_tokens=state.timestamp.token.value,
        )
        on_rank_zero(lambda: self._write(model, weights))
        if record is not None:
            record.when_ended.append(self._complete_card)

    def _complete_card(self, record: dict[str, Any]) -> None:
        """Write the card of the export again, with the ended record. A collective."""
        self.provenance = replace(self.provenance, record=record)
        on_rank_zero(self._replace_card)

    def _replace_card(self) -> None:
        card = self.path / CARD
        if card.is_file() and not may_be_replaced(card):  # since the export, some minutes ago
            log.warning("%s was edited, and is kept without the last evaluation's figures", card)
            return
        write_card(self.path, self.weights, self.provenance)

    def _write(self, model: ComposerSmolLM2, weights: dict[str, Any]) -> None:
        self._check_folder()  # again, because training takes long
        try:
            with replaced_folder(self.path) as partial:
                write_folder(model.model, model.tokenizer, partial, weights)
                base = getattr(model.config, "name_or_path", None)
                self.weights = weights_in(partial, place=self.path, base=base or None)
                write_card(partial, self.weights, self.provenance)
                names = sorted(path.name for path in partial.iterdir())
                (partial / EXPORT_MARK).write_text("\n".join(names), encoding="utf-8")
        except Exception as error:  # safetensors has an error of its own
            if is_disk_full(error):
                text = f"the export needs {_needed_bytes(model) / 1e9:.2f} GB"
                raise OSError(errno.ENOSPC, text, str(self.path)) from error
            raise
        log.info("exported to %s", self.path)


def _is_ours(path: Path, written: list[str]) -> bool:
    """Return whether an export wrote the file; marks from before 2026-11-29 list no names."""
    if path.name == EXPORT_MARK or path.name in written:
        return True
    is_known = path.suffix in _SUFFIXES or path.name == CARD  # which peft writes
    return written == [""] and path.is_file() and is_known


def _needed_bytes(model: Any) -> int:
    """Return the size of the exported weights in fp32."""
    parameters = list(model.parameters())
    if getattr(model, "using_peft", False):
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return 4 * sum(parameter.numel() for parameter in parameters)
