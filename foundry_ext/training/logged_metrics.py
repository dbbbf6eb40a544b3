"""Every metric that runs of the shipped YAMLs log: its key, unit, meaning and writer.

The W&B logger takes its axes from this table, the dashboard its panels, and the documentation its
page. Only plain data: this module imports no trainer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from foundry_ext.records.metric import MEAN_ACCURACY

TOKENS = "time/token"  # real tokens, Composer's name for them


@dataclass(frozen=True)
class LoggedMetric:
    """A key that runs log, or a pattern of keys."""

    key: str
    """Name in every logger; `*` is a set, an evaluator or an optimizer."""
    unit: str
    """Unit of the values; empty for plain numbers."""
    meaning: str
    writer: str
    """The callback that logs it, by its name in a YAML, or Composer."""
    only: str = ""
    """Condition, as "on a GPU"; empty if runs with the writer, and such a set, log it."""
    section: str = ""
    """Section of the dashboard with a panel for it; empty for none."""

    @property
    def is_table(self) -> bool:
        """True if the values are tables of text, not numbers."""
        return self.unit == "table"


# W&B takes one axis for all keys of a group.
_AGAINST_TOKENS = ("learning", "forgetting", "evaluation", "metrics", "loss")
AGAINST_TOKENS = tuple(f"{group}/*" for group in _AGAINST_TOKENS)

TRADE_OFF = "Learning against forgetting"
SHARE = "share, 0 to 1"
CHANGE = "share, -1 to 1"
NATS = "nats per token"
ANSWER_NATS = "nats per answer"
# kind -> unit of the figure, its meaning, unit of its change. kl has no change: it is one already.
_KINDS = {
    "loss": (NATS, "Mean loss of a set's labelled tokens", NATS),
    "kl": (NATS, "KL divergence from the base model, of sets with `kl: true`", ""),
    "acc": (SHARE, "Accuracy by the choices' log-probabilities", CHANGE),
    "acc_norm": (SHARE, "Accuracy by log-probability per character of a choice", CHANGE),
    "logprob": (ANSWER_NATS, "Mean log-probability of the right choice", ANSWER_NATS),
    "strict_match": (SHARE, "Generated answers whose marked result is right", CHANGE),
    "flexible_extract": (SHARE, "Generated answers whose last number is right", CHANGE),
}


def _of_sets() -> Iterator[LoggedMetric]:
    """Yield the metrics of `forgetting`: changes since step 0, and the figures themselves."""
    for role, words in (("learning", ("fall", "rise")), ("forgetting", ("rise", "fall"))):
        for kind, (_, meaning, unit) in _KINDS.items():
            text = f"{meaning}: {words[kind != 'loss']} since step 0"
            if unit:
                yield LoggedMetric(f"{role}/*_{kind}", unit, text, "forgetting", section=TRADE_OFF)
    unit, text, _ = _KINDS["kl"]
    yield LoggedMetric("forgetting/*_kl", unit, text, "forgetting", section=TRADE_OFF)
    text = "Accuracy, mean over the multiple-choice sets with this role: fall since step 0"
    key = f"forgetting/{MEAN_ACCURACY}"
    yield LoggedMetric(key, CHANGE, text, "forgetting", section=TRADE_OFF)
    for kind, (unit, text, _) in _KINDS.items():
        yield LoggedMetric(f"evaluation/*/{kind}", unit, text, "forgetting")


def _of_packing() -> Iterator[LoggedMetric]:
    """Yield the metrics of `packed_throughput`."""
    for key, unit, meaning in (
        ("real_tokens_per_sec", "tokens/s", "Real tokens, without padding, on all GPUs"),
        ("loss_tokens_per_sec", "tokens/s", "Tokens with a label, on all GPUs"),
        ("documents_per_sec", "documents/s", "Documents on all GPUs"),
        ("device/real_tokens_per_sec", "tokens/s", "Real tokens per GPU"),
        ("waiting_for_data", SHARE, "Time spent waiting for the data loader"),
    ):
        text = f"{meaning}, averaged over a window of batches"
        yield LoggedMetric(
            f"throughput/{key}", unit, text, "packed_throughput", section="Throughput"
        )
    yield LoggedMetric(
        "throughput/device/mfu",
        SHARE,
        "Useful FLOPs over the FLOPs that the GPU could do in the same time (MFU)",
        "packed_throughput",
        only="on a GPU whose peak is known",
        section="Throughput",
    )
    for key, unit, meaning in (
        ("fill", SHARE, "Real tokens over the packs' capacity"),
        ("documents_per_pack", "documents", "Documents per pack"),
    ):
        text = f"{meaning}, averaged over a window of batches"
        yield LoggedMetric(f"packing/{key}", unit, text, "packed_throughput", section="Packing")
    for key, meaning in (
        ("kept", "Rows that became one whole document"),
        ("truncated", "Rows cut to `max_seq_len`"),
        ("split", "Documents that are a piece of a longer row"),
        ("dropped_overlong", "Rows left out because they were too long"),
        ("dropped_no_loss", "Rows left out because no token has a label"),
        ("dropped_empty", "Rows left out because they have no tokens"),
        ("tokens_cut", "Tokens of the training data that truncation or dropping removed"),
    ):
        unit = {"tokens_cut": "tokens", "split": "documents"}.get(key, "rows")
        yield LoggedMetric(f"data/{key}", unit, f"{meaning}; logged once", "packed_throughput")
    yield LoggedMetric(
        "data/responses_not_trained",
        "responses",
        "Responses of chats that `target_responses` leaves out; logged once",
        "packed_throughput",
        only="for chats that have such responses",
    )


def _of_memory() -> Iterator[LoggedMetric]:
    """Yield the metrics of Composer's `memory_monitor`."""
    kinds = {
        "allocated": "in tensors",
        "active": "in tensors, or not yet released by a stream",
        "inactive": "in unused parts of blocks that are in use",
        "reserved": "taken from the GPU by torch",
    }
    for moment, words in (("peak", "Largest memory so far"), ("current", "Memory now")):
        for kind, meaning in kinds.items():
            is_shown = (moment, kind) in (("peak", "reserved"), ("peak", "allocated"))
            yield LoggedMetric(
                f"memory/{moment}_{kind}_mem",
                "GB",
                f"{words} {meaning}, on the first rank's GPU",
                "memory_monitor",
                only="on a GPU",
                section="Memory" if is_shown else "",
            )
    yield LoggedMetric(
        "memory/alloc_retries",
        "",
        "Allocations that succeeded only after torch had freed its cache",
        "memory_monitor",
        only="on a GPU",
        section="Memory",
    )


def _of_training() -> Iterator[LoggedMetric]:
    """Yield the metrics of Composer itself and of the other callbacks."""
    training = "Training"
    text = "Training loss, mean over the batch's labelled tokens"
    yield LoggedMetric("loss/train/total", NATS, text, "Composer", section=training)
    yield LoggedMetric(
        "metrics/*/LanguageCrossEntropy",
        NATS,
        "Loss on the evaluation loader, mean over labelled tokens",
        "Composer",
        section=training,
    )
    text = "Exponential of LanguageCrossEntropy"
    yield LoggedMetric("metrics/*/LanguagePerplexity", "", text, "Composer")
    yield LoggedMetric(
        "metrics/*/TokenAccuracy",
        SHARE,
        "Labelled tokens of the evaluation loader that are the likeliest",
        "Composer",
        section=training,
    )
    text = "Learning rate of the first group of parameters"
    yield LoggedMetric("lr-*/group0", "", text, "lr_monitor", section=training)
    text = "Norm of the gradients of a step before clipping"
    yield LoggedMetric("guard/gradient_norm", "", text, "guard", section=training)
    text = "Steps skipped so far because of a wrong loss or gradient"
    yield LoggedMetric("guard/skipped", "steps", text, "guard", only="after a step was skipped")
    text = "Parameters that are trained; logged once"
    yield LoggedMetric("model/trainable_parameters", "parameters", text, "run_record")
    yield LoggedMetric(
        "model/effective_scale",
        "",
        "Factor of the adapter's product of matrices; logged once",
        "run_record",
        only="with an adapter",
    )
    text = "Continuations of the prompts at each evaluation"
    yield LoggedMetric("text_samples", "table", text, "text_samples", section="Samples")
    for key, unit, meaning in (
        ("time/token", "tokens", "Real tokens trained on so far"),
        ("time/token_in_epoch", "tokens", "Real tokens trained on in this epoch"),
        ("time/batch", "steps", "Batches trained on so far"),
        ("time/batch_in_epoch", "steps", "Batches trained on in this epoch"),
        ("time/sample", "documents", "Documents trained on so far"),
        ("time/sample_in_epoch", "documents", "Documents trained on in this epoch"),
        ("time/epoch", "epochs", "Complete epochs"),
        ("trainer/device_train_microbatch_size", "packs", "Packs per microbatch and GPU"),
    ):
        yield LoggedMetric(key, unit, meaning, "Composer")


METRICS = (*_of_sets(), *_of_packing(), *_of_memory(), *_of_training())


def metric_of(key: str) -> LoggedMetric | None:
    """Return the declaration of a logged key; None if there is none."""
    return next((metric for metric in METRICS if fnmatchcase(key, metric.key)), None)
