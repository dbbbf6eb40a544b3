"""A parity as text: a table per dtype, what was skipped, and where ours exceeds rounding."""

from collections.abc import Sequence

from foundry_ext.preflight.parity.activations import WHOLE
from foundry_ext.preflight.parity.differences import FACTOR, Column, Parity

_LABEL = 11  # characters of a row's name


def format_parity(parity: Parity) -> str:
    """Return the text; its last line is the verdict."""
    documents = ", ".join(map(str, parity.lengths))
    lines = [
        f"parity {parity.model} on {parity.device}: documents of {documents} tokens",
        "Difference of ours from transformers' LlamaForCausalLM: largest and mean, in a run of the"
        " whole model.",
        "x: error of the row's worst part, each layer given the same input, in units of the error"
        f" that rounding alone makes. More than {FACTOR:g} has a !.",
    ]
    for dtype, columns in parity.by_dtype().items():
        lines += ["", *_table(dtype, columns, parity)]
    return "\n".join([*lines, "", *skipped_lines(parity), verdict(parity)])


def _table(dtype: str, columns: list[Column], parity: Parity) -> list[str]:
    head = f"{dtype:{_LABEL}}" + "".join(f"  {column.backend:<23}" for column in columns)
    units = " " * _LABEL + "  largest    mean       x " * len(columns)
    rows = [
        f"{row:{_LABEL}}" + "".join(_cell(column, row) for column in columns) for row in parity.rows
    ]
    return [line.rstrip() for line in (head, units, *rows)]


def _cell(column: Column, row: str) -> str:
    (largest, mean, ratio), (whole_exceeds, part_exceeds) = cells(column, row)
    marks = ["!" if exceeds else " " for exceeds in (whole_exceeds, part_exceeds)]
    return f"  {largest:>7} {mean:>7}{marks[0]}{ratio:>6}{marks[1]}"


def cells(column: Column, row: str) -> tuple[tuple[str, str, str], tuple[bool, bool]]:
    """Return the texts of a row, and whether the whole model and the worst part exceed rounding.

    The texts are largest and mean difference, and x; "-" if the row was not compared.
    """
    worst = column.worst(row)
    if worst is None:
        return ("-", "-", "-"), (False, False)
    whole = column.parts(row)[WHOLE]
    texts = (_short(whole.largest), _short(whole.mean), format_ratio(worst[1].ratio))
    return texts, (whole.exceeds, worst[1].exceeds)


def _short(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-")


def format_ratio(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0e}"


def skipped_lines(parity: Parity) -> list[str]:
    """Return a line per backend and reason, with the dtypes that were skipped."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for (dtype, backend), reason in parity.skipped.items():
        by_reason.setdefault((backend, reason), []).append(dtype)
    return [
        f"skipped: {backend} in {', '.join(dtypes)}: {reason}"
        for (backend, reason), dtypes in by_reason.items()
    ]


def verdict(parity: Parity) -> str:
    """Return a line that says whether ours is within rounding, or where first it is not."""
    beyond = parity.beyond()
    if not parity.columns:
        return "nothing was compared"
    if not beyond:
        plural = "" if len(parity.columns) == 1 else "s"
        return f"within rounding: every layer of {len(parity.columns)} combination{plural}"
    site, columns = next(iter(beyond.items()))
    worst = max((column.differences[site] for column in columns), key=lambda d: d.ratio)
    num_beyond, num_all = sum(map(len, beyond.values())), len(parity.columns)
    where = "all of them" if len(columns) == num_all else _names(columns)
    return (
        f"BEYOND ROUNDING, first at {site.row}, {site.part}: error {worst.error:.1e} where rounding"
        f" makes {worst.rounding:.1e}; {num_beyond} of {num_all} combinations exceed it, at this"
        f" place {where}"
    )


def _names(columns: Sequence[Column]) -> str:
    """Return the backends by dtype, as in `fp32 (sdpa, flex), bf16 (sdpa)`."""
    by_dtype: dict[str, list[str]] = {}
    for column in columns:
        by_dtype.setdefault(column.dtype, []).append(column.backend)
    return ", ".join(f"{dtype} ({', '.join(names)})" for dtype, names in by_dtype.items())
