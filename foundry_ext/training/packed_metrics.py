"""Composer's and llm-foundry's metrics of a packed batch, whose logits are never all there."""

from composer.metrics.nlp import LanguageCrossEntropy
from llmfoundry.metrics.token_acc import TokenAccuracy
from torchmetrics import Metric

from foundry_ext.models.smollm2 import PackedCausalLMOutput
from foundry_ext.utils.errors import UserError


def update_by_sums(metric: Metric, outputs: PackedCausalLMOutput) -> None:
    """Update a metric by a packed batch's sums, with the same result as by its logits.

    Raises:
        UserError: the metric needs logits.
    """
    count = outputs.num_loss_tokens
    assert outputs.loss is not None and outputs.num_correct is not None and count is not None
    device = metric.device
    if isinstance(metric, LanguageCrossEntropy):  # perplexity is a subclass
        metric.sum_loss += (outputs.loss * count).to(device)
        metric.total_items += count.to(device)
    elif isinstance(metric, TokenAccuracy):
        metric.correct_tokens += outputs.num_correct.to(device)
        metric.total_tokens += count.to(device)
    else:
        raise UserError(
            f"{type(metric).__name__} needs logits, which a packed evaluation does not compute;"
            " take it out of additional_eval_metrics, or evaluate with the finetuning loader"
        )
    # As Metric.update does; without it torchmetrics warns, or returns an earlier result.
    metric._update_count += 1
    metric._computed = None
