"""The difference of ours from transformers' model at every site, and the bound that rounding sets.

Both are held against the exact result. The error of transformers' own model is what rounding alone
makes; ours may be `FACTOR` times that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foundry_ext.preflight.parity.activations import (
    LAYER_PARTS,
    LOSS,
    NOT_LAYERS,
    WHOLE,
    Site,
)

FACTOR = 4.0
"""Roundings that ours may be off. Correct kernels that round in another order are off by up to 1.8
in a layer, and by 2.9 in the gradient through all layers of a narrow model."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Distance of ours from theirs at one site, and of both from the exact result."""

    largest: float
    """Largest absolute difference of ours from theirs."""
    mean: float
    error: float
    """Relative error of ours at the worst token, in norms of the exact result."""
    rounding: float
    """Error of theirs, computed alike, and at least one rounding of the dtype."""

    @property
    def ratio(self) -> float:
        return self.error / self.rounding

    @property
    def exceeds(self) -> bool:
        return not self.ratio <= FACTOR  # NaN exceeds


@dataclass(frozen=True)
class Column:
    """The comparison in one dtype with one attention backend."""

    dtype: str
    backend: str
    differences: Mapping[Site, Difference]

    def parts(self, row: str) -> dict[str, Difference]:
        """Return a row's differences by part, in the order in which a layer computes them."""
        return {site.part: d for site, d in self.differences.items() if site.row == row}

    def worst(self, row: str) -> tuple[str, Difference] | None:
        """Return the part of a row that is the most roundings off; None if it was not compared.

        Parts come from layers that are given the same input, so an error of the layers before does
        not count. Only where there are none, as for the loss, is it the whole model's.
        """
        parts = self.parts(row)
        alone = {name: part for name, part in parts.items() if name != WHOLE} or parts
        return max(alone.items(), key=lambda part: (part[1].exceeds, part[1].ratio), default=None)

    def first_beyond(self) -> Site | None:
        """Return the first site, in the order of computation, where ours exceeds rounding."""
        return next((site for site, d in self.differences.items() if d.exceeds), None)


@dataclass
class Parity:
    """The comparison of a model in all dtypes and backends that the device offers."""

    model: str
    device: str
    lengths: Sequence[int]
    """Tokens of the documents."""
    rows: Sequence[str]
    columns: list[Column] = field(default_factory=list)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    """(dtype, backend) -> why it was not compared."""

    @property
    def layers(self) -> list[str]:
        """Rows of decoder layers."""
        return [row for row in self.rows if row not in NOT_LAYERS]

    def by_dtype(self) -> dict[str, list[Column]]:
        found: dict[str, list[Column]] = {}
        for column in self.columns:
            found.setdefault(column.dtype, []).append(column)
        return found

    def beyond(self) -> dict[Site, list[Column]]:
        """Return the columns that exceed rounding by the site where each does so first.

        Sites are in the order of computation, so the first is the place to look.
        """
        found: dict[Site, list[Column]] = {}
        for column in self.columns:
            site = column.first_beyond()
            if site is not None:
                found.setdefault(site, []).append(column)
        order = {site: index for index, site in enumerate(sites_of(self.rows))}
        return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def sites_of(names: Sequence[str]) -> Iterator[Site]:
    """Yield the sites of these rows in the order of computation."""
    for row in names:
        yield from (Site(row, part) for part in (*LAYER_PARTS, row, WHOLE))


def difference(
    site: Site, ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype
) -> Difference:
    """Compare outputs [T, ...] of one site; a loss is [1, 1] in ours and [L, 1] in the others."""
    ours, theirs, exact = (x.double() for x in (ours, theirs, exact))
    if site.row == LOSS:
        # Of a mean, errors of tokens cancel by luck, which is no bound: theirs all count.
        error, rounding = (ours - exact.mean()).abs(), (theirs - exact).abs().mean()
        error, rounding = (x / exact.mean() for x in (error, rounding))
        theirs, dtype = theirs.mean(), torch.float32  # of the loss in every dtype
    else:
        error, rounding = (_error(x, exact) for x in (ours, theirs))
    apart = (ours - theirs).abs()
    return Difference(
        largest=apart.max().item(),
        mean=apart.mean().item(),
        error=error.max().item(),
        rounding=max(rounding.max().item(), torch.finfo(dtype).eps / 2),
    )


def _error(x: Tensor, exact: Tensor) -> Tensor:
    """Return the norm of the difference over the norm, of every token: [T]."""
    return (x - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=torch.finfo(exact.dtype).tiny)
