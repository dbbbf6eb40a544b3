"""The claims of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673), tested on compared runs.

A claim is about methods, so it takes at least three seeds of every method that it names. With
fewer, the finding holds for these runs only, and the verdict says that it cannot be told.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from foundry_ext.comparison.comparison import Comparison
from foundry_ext.comparison.finding import Finding, needed
from foundry_ext.comparison.paired_claims import (
    FULL,
    forgets_less,
    forgets_less_at_equal_learning,
    gap_shrinks,
    learns_less,
    method_of_group,
    plain_full,
    regularises_more,
)
from foundry_ext.comparison.pairwise import is_distinguishable
from foundry_ext.comparison.runs import Run
from foundry_ext.comparison.sensitivity import compare_sensitivity
from foundry_ext.comparison.statistics import MIN_SEEDS, holm, over_seeds
from foundry_ext.utils.nested import get


def find_claims(comparison: Comparison) -> list[Finding]:
    """Return a finding per claim and adapter; nothing unless full fine-tuning and an adapter ran.

    Claims that these runs do not test are listed once.
    """
    full = plain_full(comparison)
    adapters = [label for label in comparison.groups if method_of_group(comparison, label) != FULL]
    if full is None or not adapters:
        return []
    findings: list[Finding] = []
    for claim, find in _CLAIMS.items():
        found = list(find(comparison, full, adapters))
        findings += [_named(claim, each) for each in found if each.estimate is not None]
        if not any(each.estimate is not None for each in found):
            findings.append(_named(claim, found[0] if found else Finding()))
    return findings


def _named(claim: str, finding: Finding) -> Finding:
    is_told = finding.in_general and finding.is_distinguishable
    return replace(finding, claim=claim, needs="" if is_told else finding.needs)


def _changes_by_high_rank(
    comparison: Comparison, full: str, adapters: Sequence[str]
) -> Iterator[Finding]:
    values = full_ranks([run for run in comparison.all_runs if run.label == full])
    if not values:
        yield Finding(needs="foundry-ext analyse of full fine-tuning's runs")
        return
    mean, in_general = fmean(values), len(values) >= MIN_SEEDS
    findings = []
    for label in adapters:
        rank = comparison.groups[label][0].record["model"]["rank"]
        findings.append(
            Finding(
                groups=(full, label),
                estimate=mean - rank,
                interval=over_seeds([value - rank for value in values]) if in_general else None,
                is_distinguishable=mean != rank,
                in_general=in_general,
                detail=f"full fine-tuning's change needs {mean:.4g} singular values for 90 % of its"
                f" energy (median over matrices), {mean / rank:.2g} times {label}'s rank of {rank}",
                needs=needed(in_general, "more seeds"),
            )
        )
    yield from _corrected(findings)


def full_ranks(runs: Sequence[Run]) -> list[float]:
    """Return the median rank of each analysed run's change, at the rate with the most seeds."""
    by_rate: dict[float, dict[int, float]] = {}
    for run in runs:
        value = get(run.analysis or {}, "summary.median_rank_90")
        if isinstance(value, int | float):
            by_rate.setdefault(run.learning_rate, {})[run.seed] = float(value)
    return list(max(by_rate.values(), key=len, default={}).values())


def _depends_on_the_rate(
    comparison: Comparison, full: str, adapters: Sequence[str]
) -> Iterator[Finding]:
    findings = []
    for label in adapters:
        pair = compare_sensitivity(comparison, label, full)
        if isinstance(pair, str):
            yield Finding(needs=pair)
            continue
        show, interval = comparison.learning.show, pair.interval
        in_general = interval is not None and interval.kind.startswith("seeds")
        findings.append(
            Finding(
                groups=(label, full),
                metric=comparison.learning,
                estimate=pair.difference,
                interval=interval,
                in_general=in_general,
                detail=f"mean learning lost at rates {pair.factor:.3g} times larger and smaller"
                f" than the best: {label} {show(pair.lost[0])}, {full} {show(pair.lost[1])}",
                needs=needed(in_general, "more seeds or items", " at every learning rate"),
            )
        )
    yield from _corrected(findings)


def _corrected(findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield the findings on one claim, with p-values corrected for their number."""
    adjusted = holm([each.interval.p if each.interval else None for each in findings])
    for each, p in zip(findings, adjusted, strict=True):
        told = is_distinguishable(each.interval, p) if each.interval else each.is_distinguishable
        yield replace(each, is_distinguishable=told)


_Find = Callable[[Comparison, str, Sequence[str]], Iterator[Finding]]
_CLAIMS: Mapping[str, _Find] = {
    "LoRA learns less than full fine-tuning, each at its best learning rate": learns_less,
    "LoRA forgets less than full fine-tuning, each at its best learning rate": forgets_less,
    "LoRA forgets less than full fine-tuning at equal learning": forgets_less_at_equal_learning,
    "A higher rank shrinks the gap in learning": gap_shrinks,
    "Full fine-tuning changes the weights by a higher rank than LoRA can": _changes_by_high_rank,
    "LoRA limits forgetting more than weight decay and dropout do": regularises_more,
    "LoRA depends more on the learning rate than full fine-tuning": _depends_on_the_rate,
}
