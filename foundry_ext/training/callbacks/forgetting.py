"""`forgetting`: measures what a run learns and forgets, at step 0 and at every evaluation."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from peft import PeftModel

from foundry_ext.config.outputs import ITEMS
from foundry_ext.data.dataloader import PackedDataset
from foundry_ext.data.ranks import check_same
from foundry_ext.evaluation.base_model import BaseCopy, adapters_off, weights_fingerprint
from foundry_ext.evaluation.config import DocumentsSetConfig, parse_sets
from foundry_ext.evaluation.documents import DocumentsSet
from foundry_ext.evaluation.measure import EvalSet, build_sets, measure
from foundry_ext.evaluation.metrics import Item, changes
from foundry_ext.evaluation.scoring import Shard
from foundry_ext.models.scores import BaseStates
from foundry_ext.training.data_checks import refuse_training_documents
from foundry_ext.training.meter import unwrapped
from foundry_ext.training.model import ComposerSmolLM2
from foundry_ext.training.run_files import run_files
from foundry_ext.utils.errors import UserError
from foundry_ext.utils.json_lines import HeldLines

log = logging.getLogger(__name__)


class Forgetting(Callback):
    """Callback that measures evaluation sets and logs what was learned and forgotten since step 0.

    Logged are `evaluation/<set>/<metric>` as measured, `learning/<set>_<metric>`, positive if the
    run learned, and `forgetting/<set>_<metric>`, positive if it forgot. Metrics are loss and KL to
    the base model, in mean nats per token, acc, acc_norm, strict_match, flexible_extract, and
    logprob, the mean log-probability of the right choice.
    `forgetting/mean_accuracy` is the mean over the forgetting multiple-choice sets, each by its
    `metric`.

    Step 0 is measured before the first batch, with or without `eval_first`. Later measurements
    follow Composer's evaluations (`eval_interval`, with an `eval_loader`). The base model is the
    model that training starts from: the weights under an adapter, or else a frozen copy, which is
    made only if a set has `kl`. What it computes for the documents does not change, and is kept in
    the host's memory, up to 1 GiB per rank. Ranks share the work. FSDP is refused.

    `evaluations` holds {step, real_tokens, metrics, learning, forgetting} for every measurement,
    and is part of checkpoints.

    Args:
        sets: name -> {role: learning | forgetting, type: documents | multiple_choice | generation,
            and that type's keys}, see foundry_ext/evaluation/config.py.
        items: a file that gets a line of JSON per item and step; `{run_name}` is replaced.

    Raises:
        UserError: before the first step, if a set cannot be measured or is the training set.
    """

    def __init__(self, sets: Mapping[str, Mapping[str, Any]], items: str | None = None):
        self.configs = parse_sets(sets)
        self.items_path = items
        self.items: HeldLines | None = None  # of rank 0
        self.evaluations: list[dict[str, Any]] = []
        self.sets: list[EvalSet] = []
        self.base: BaseStates | None = None
        self.base_fingerprint: str | None = None
        self.loaded_fingerprint: str | None = None

    # --- before the first step -------------------------------------------------------------------

    def init(self, state: State, logger: Logger) -> None:
        """Read the sets, and keep the base model before a checkpoint is loaded over it."""
        if state.fsdp_config is not None:
            raise UserError(
                "forgetting cannot measure a model that FSDP shards: leave out fsdp_config to train"
                " with DDP, or leave out the callback and run `foundry-ext eval` on the checkpoints"
            )
        model = _composer_model(state)
        inner, tokenizer = model.inner_model, model.tokenizer
        assert tokenizer is not None
        if self.items_path is not None:
            path = run_files(state).add(ITEMS, self.items_path)
            self.items = HeldLines(path) if dist.get_global_rank() == 0 else None
        self.sets = build_sets(self.configs, tokenizer, inner.config.max_position_embeddings)
        items = {
            f"callbacks.forgetting.sets.{one.config.name} ({key})": value
            for one in self.sets
            for key, value in one.description.items()
            if key != "name"  # which may be a path
        }
        check_same(items, "give all nodes the same rows")
        if any(isinstance(config, DocumentsSetConfig) and config.kl for config in self.configs):
            self.base_fingerprint = weights_fingerprint(inner)
            adapted = model.model
            is_adapted = isinstance(adapted, PeftModel)
            self.base = BaseStates(adapters_off(adapted) if is_adapted else BaseCopy(inner))

    def after_load(self, state: State, logger: Logger) -> None:
        if self.items_path is not None:
            run_files(state).settle(state)
        self._refuse_training_data(state)
        resumed = state.timestamp.batch > 0
        if resumed and not self.evaluations:
            raise UserError(
                "forgetting: the checkpoint holds no measurement of step 0 to compare with; start"
                " again from the base model, or leave out the callback and run `foundry-ext eval`"
                " after the run"
            )
        if self.base is not None:
            self._settle_base(state, resumed)

    def _refuse_training_data(self, state: State) -> None:
        train = getattr(state.train_dataloader, "dataset", None)
        if not isinstance(train, PackedDataset):
            return
        for eval_set in self.sets:
            if isinstance(eval_set, DocumentsSet):
                key = f"sets.{eval_set.config.name}.loader"
                refuse_training_documents(key, eval_set.dataset, train, eval_set.indices)

    def _settle_base(self, state: State, resumed: bool) -> None:
        assert self.base is not None
        if isinstance(self.base.base, BaseCopy):  # made before exact_resume restored the choices
            tuned: Any = unwrapped(state)
            self.base.base.compute_as(tuned.inner_model)
        if not resumed:
            # With load_weights_only training starts from weights loaded after `init`.
            inner = _composer_model(state).inner_model
            self.base_fingerprint = weights_fingerprint(inner)
            self.base.forget()
            if isinstance(self.base.base, BaseCopy):
                self.base.base.retake(inner)
        elif self.loaded_fingerprint not in (None, self.base_fingerprint):
            raise UserError(
                "forgetting: the run started from another base model than the YAML names now;"
                " restore model.pretrained_model_name_or_path, or start a new run"
            )

    def fit_start(self, state: State, logger: Logger) -> None:
        if not state.evaluators:
            raise UserError(
                "forgetting measures when Composer evaluates: give an eval_loader and an"
                " eval_interval"
            )
        if not self.evaluations:
            self._measure(state, logger)

    # --- measuring -------------------------------------------------------------------------------

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._measure(state, logger)

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Measure at the end of `eval_first`."""
        self._measure(state, logger)

    def _measure(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if self.evaluations and self.evaluations[-1]["step"] == step:
            return  # several evaluations may end at one step
        started = time.perf_counter()
        with get_precision_context(state.precision, state.precision_config, False):
            metrics, items = measure(
                self.sets,
                _composer_model(state).inner_model,
                self.base,
                shard=Shard(dist.get_global_rank(), dist.get_world_size()),
                gather=_gather,
            )
        start = self.evaluations[0]["metrics"] if self.evaluations else metrics
        evaluation = {
            "step": step,
            "real_tokens": state.timestamp.token.value,
            "metrics": metrics,
            **changes(self.configs, start, metrics),
        }
        self.evaluations.append(evaluation)
        self._write(step, items)
        logger.log_metrics(
            {
                **{f"evaluation/{name}": value for name, value in metrics.items()},
                **{
                    f"{role}/{name}": value
                    for role in ("learning", "forgetting")
                    for name, value in evaluation[role].items()
                },
            }
        )
        log.info("step %d: %d sets in %.1f s", step, len(self.sets), time.perf_counter() - started)

    def _write(self, step: int, items: list[Item]) -> None:
        if self.items is not None:
            self.items.write({"step": step, **item} for item in items)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._open_items(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._open_items(state)

    def _open_items(self, state: State) -> None:
        """Open the file once the first step has ended; step 0's items are held back until then."""
        if self.items is not None:
            self.items.begin(resumed=run_files(state).continues)

    def close(self, state: State, logger: Logger) -> None:
        if self.items is not None:
            self.items.close()

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluations": self.evaluations,
            "base": self.base_fingerprint,
            "sets": {eval_set.config.name: eval_set.digest for eval_set in self.sets},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the checkpoint's measurements.

        Raises:
            UserError: a set was added, left out, or now holds other items.
        """
        self._check_same_sets(state.get("sets"))
        self.evaluations = list(state["evaluations"])
        self.loaded_fingerprint = state["base"]

    def _check_same_sets(self, before: Mapping[str, str] | None) -> None:
        if before is None:  # an earlier version did not store them
            return
        way_out = "or start a new run with another run_name and save_folder"
        now = {eval_set.config.name: eval_set for eval_set in self.sets}
        for name in sorted(now.keys() ^ before.keys()):
            raise UserError(
                f"forgetting.sets.{name}: not in the run that the checkpoint is of, so it has no"
                f" measurement of step 0 to compare with; leave it out, {way_out}"
                if name in now
                else f"forgetting.sets.{name}: the run that the checkpoint is of measures it, and"
                f" its curves and means would end in the middle; restore it, {way_out}"
            )
        for name, eval_set in now.items():
            if eval_set.digest != before[name]:
                raise UserError(
                    f"forgetting.sets.{name}: {eval_set.description['name']} holds other items than"
                    f" those measured so far ({before[name]}, now {eval_set.digest}), so its curve"
                    f" would join two sets; restore the file and the tokenizer, {way_out}"
                )


def _composer_model(state: State) -> ComposerSmolLM2:
    model = unwrapped(state)
    if not isinstance(model, ComposerSmolLM2):
        raise UserError(
            f"forgetting measures smollm2_packed models, not {type(model).__name__}; set"
            " model.name: smollm2_packed"
        )
    return model


def _gather(items: list[Item]) -> list[Item]:
    return [item for rank in dist.all_gather_object(items) for item in rank]
