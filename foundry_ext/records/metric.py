"""One column of the records' `learning` or `forgetting`: its set, its unit and how it is shown."""

from dataclasses import dataclass

MEAN_ACCURACY = "mean_accuracy"
KINDS = ("strict_match", "flexible_extract", "acc_norm", "acc", "loss", "kl", "logprob")
NATS = ("loss", "kl", "logprob")


@dataclass(frozen=True)
class Metric:
    """One column of the records' `learning` or `forgetting`."""

    role: str
    """"learning" or "forgetting"."""
    key: str
    """The record's key, e.g. target_loss."""

    @property
    def kind(self) -> str:
        """One of KINDS; acc for the mean accuracy, and empty if unknown."""
        if self.key == MEAN_ACCURACY:
            return "acc"
        return next((kind for kind in KINDS if self.key.endswith(f"_{kind}")), "")

    @property
    def set_name(self) -> str:
        """Name of the evaluation set, e.g. target."""
        return self.key.removesuffix(f"_{self.kind}")

    @property
    def is_binary(self) -> bool:
        """True if each item is either right or wrong."""
        return self.kind in KINDS[:4] and self.key != MEAN_ACCURACY

    @property
    def unit(self) -> str:
        """Unit of shown values."""
        if self.kind == "logprob":
            return "nats per answer"
        return "nats per token" if self.kind in NATS else "points"

    @property
    def scale(self) -> float:
        """Factor from the record's values to shown values; accuracies are shown in points."""
        return 1.0 if self.kind in NATS else 100.0

    @property
    def subject(self) -> str:
        """Set and kind, e.g. "target (loss)"."""
        return "mean accuracy" if self.key == MEAN_ACCURACY else f"{self.set_name} ({self.kind})"

    @property
    def title(self) -> str:
        """Role and subject, e.g. "Learning: target (loss)"."""
        return f"{self.role.capitalize()}: {self.subject}"

    def show(self, value: float, *, signed: bool = False) -> str:
        """Format a value as the report shows it, without its unit."""
        digits = 1 if self.scale == 100 else 3
        shown = f"{value * self.scale:{'+' if signed else ''}.{digits}f}"
        return shown.replace("-", "−")

    def show_limits(self, low: float, high: float, *, signed: bool = False) -> str:
        """Format an interval, e.g. "[3.823, 3.919]"."""
        return f"[{self.show(low, signed=signed)}, {self.show(high, signed=signed)}]"
