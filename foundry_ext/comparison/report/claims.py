"""Section on the claims of "LoRA Learns Less and Forgets Less", with a verdict on each."""

from foundry_ext.comparison.claims import find_claims
from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.finding import Finding, Verdict
from foundry_ext.comparison.report.document import Block, Heading, Table
from foundry_ext.comparison.report.wording import NO_VALUE
from foundry_ext.comparison.statistics import MIN_SEEDS


def claim_blocks(comparison: Comparison) -> list[Block]:
    """Return the section; nothing unless full fine-tuning and an adapter are compared."""
    findings = find_claims(comparison)
    if not findings:
        return []
    return [
        Heading("The paper's claims"),
        Table(
            ["claim", "difference", "seen here", "verdict"],
            [[_claim(each), _groups(each), _seen(each), verdict_text(each)] for each in findings],
            'Claims of "LoRA Learns Less and Forgets Less" (Biderman et al. 2024, arXiv'
            " 2405.09673), tested for each adapter. A positive difference agrees with the claim."
            f" Verdicts are about methods, so they take {MIN_SEEDS} seeds of each; with fewer, the"
            " verdict says what these runs show alone. Intervals are of 95 %. A verdict also takes"
            " a p-value below 5 % after Holm's correction over the pairs.",
        ),
    ]


def _claim(finding: Finding) -> str:
    return finding.claim


def _groups(finding: Finding) -> str:
    return " − ".join(finding.groups) or NO_VALUE


def _seen(finding: Finding) -> str:
    if finding.estimate is None:
        return NO_VALUE
    metric, interval = finding.metric, finding.interval
    if metric is None:
        text = f"{finding.estimate:+.4g}".replace("-", "−")
        if interval is not None:
            text += f" [{interval.low:+.4g}, {interval.high:+.4g}]".replace("-", "−")
    else:
        text = metric.show(finding.estimate, signed=True)
        if interval is not None:
            text += f" {metric.show_limits(interval.low, interval.high, signed=True)}"
        text += f" {metric.unit}"
    return f"{text}; {finding.detail}" if finding.detail else text


def verdict_text(finding: Finding) -> str:
    """Return the verdict, what would settle it, and what these runs show if seeds are too few."""
    text = finding.verdict.value
    if finding.needs:
        text += f"; it would need {finding.needs}"
    if finding.verdict is Verdict.CANNOT_BE_TOLD and not finding.in_general:
        told = finding.in_these_runs
        shown = "no difference shows" if told is Verdict.CANNOT_BE_TOLD else f"it {told.value}"
        text += f" (in these runs alone, {shown})"
    return text
