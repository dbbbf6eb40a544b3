"""Parameters of a W&B sweep file: their distributions, grid values and random draws.

The distributions have the names, defaults and meaning that W&B gives them
(https://docs.wandb.ai/guides/sweeps/sweep-config-keys). The numbers drawn are not those of W&B.
"""

import inspect
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from foundry_ext.utils.errors import UserError


def _quantised(number: float, q: float) -> float:
    """Return the multiple of q nearest to number; it is an int if q is one."""
    return round(number / q) * q


def _log_between(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


# distribution -> its draw. The arguments after rng are the keys that it takes in a sweep file.
DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "constant": lambda rng, value: value,
    "categorical": lambda rng, values: rng.choice(values),
    "categorical_w_probabilities": lambda rng, values, probabilities: rng.choices(
        values, probabilities
    )[0],
    "int_uniform": lambda rng, min, max: rng.randint(min, max),
    "uniform": lambda rng, min, max: rng.uniform(min, max),
    "q_uniform": lambda rng, min, max, q=1: _quantised(rng.uniform(min, max), q),
    "log_uniform": lambda rng, min, max: math.exp(rng.uniform(min, max)),
    "log_uniform_values": lambda rng, min, max: _log_between(rng, min, max),
    "q_log_uniform_values": lambda rng, min, max, q=1: _quantised(_log_between(rng, min, max), q),
    "normal": lambda rng, mu=0.0, sigma=1.0: rng.gauss(mu, sigma),
    "q_normal": lambda rng, mu=0.0, sigma=1.0, q=1: _quantised(rng.gauss(mu, sigma), q),
    "log_normal": lambda rng, mu=0.0, sigma=1.0: rng.lognormvariate(mu, sigma),
    "beta": lambda rng, a=1.0, b=1.0: rng.betavariate(a, b),
}
REFUSED = ("q_log_uniform", "inv_log_uniform", "inv_log_uniform_values", "q_log_normal", "q_beta")


def keys_of(distribution: str) -> dict[str, Any]:
    """Return key -> default of the keys that a distribution takes; `...` if it must be given."""
    _, *parameters = inspect.signature(DISTRIBUTIONS[distribution]).parameters.values()
    return {p.name: ... if p.default is p.empty else p.default for p in parameters}


KEYS = {"distribution", "parameters", *(key for name in DISTRIBUTIONS for key in keys_of(name))}


@dataclass(frozen=True)
class Parameter:
    """A checked parameter of a sweep."""

    path: tuple[str, ...]
    """One name, or several if `parameters:` are nested."""
    distribution: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def grid_values(self) -> list[Any]:
        """Return the distinct values in the order written, or raise UserError if uncountable."""
        settings = self.settings
        if self.distribution == "constant":
            return [settings["value"]]
        if self.distribution == "categorical":
            return list({repr(value): value for value in settings["values"]}.values())
        if self.distribution == "int_uniform":
            return list(range(settings["min"], settings["max"] + 1))
        if self.distribution == "q_uniform":  # like numpy.arange: excludes the end
            count = math.ceil((settings["max"] - settings["min"]) / settings["q"])
            return [settings["min"] + i * settings["q"] for i in range(count)]
        raise UserError(
            f"parameter {self.name}: {self.distribution} has no countable values for method grid; "
            "give values:, or use method random"
        )

    def draw(self, rng: random.Random) -> Any:
        return DISTRIBUTIONS[self.distribution](rng, **self.settings)


def parameter(path: tuple[str, ...], entry: Mapping[str, Any]) -> Parameter:
    """Check `entry` and return its parameter; a ValueError names it and says what to write."""
    name = ".".join(path)
    unknown = sorted(set(map(str, entry)) - KEYS)
    if unknown:
        raise UserError(
            f"parameter {name}: unknown key, {unknown[0]!r}; known: {', '.join(sorted(KEYS))}"
        )
    distribution = _distribution(name, entry)
    defaults = keys_of(distribution)
    settings = {**defaults, **{key: entry[key] for key in entry if key != "distribution"}}
    for key, value in settings.items():
        if value is ...:
            raise UserError(f"parameter {name}: {distribution} needs {key}; add it")
    for key in sorted(settings.keys() - defaults.keys()):
        raise UserError(f"parameter {name}: {distribution} does not take {key}; remove it")
    _check_settings(name, distribution, settings)
    return Parameter(path, distribution, settings)


def _distribution(name: str, entry: Mapping[str, Any]) -> str:
    if "distribution" in entry:
        given = entry["distribution"]
        if given in REFUSED:
            raise UserError(
                f"parameter {name}: distribution {given} is not known here, only to W&B's server; "
                "use `wandb sweep`, or another distribution"
            )
        if given not in DISTRIBUTIONS:
            raise UserError(
                f"parameter {name}: unknown distribution, {given!r}; "
                f"known: {', '.join(DISTRIBUTIONS)}"
            )
        if given == "categorical" and "probabilities" in entry:
            return "categorical_w_probabilities"
        return given
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical_w_probabilities" if "probabilities" in entry else "categorical"
    if "min" in entry or "max" in entry:
        is_integral = all(type(entry.get(key)) is int for key in ("min", "max"))
        return "int_uniform" if is_integral else "uniform"
    raise UserError(f"parameter {name}: no value; give value:, values: [...], or min: and max:")


def _check_settings(name: str, distribution: str, settings: Mapping[str, Any]) -> None:
    if "values" in settings:
        values = settings["values"]
        if not isinstance(values, list) or not values:
            raise UserError(
                f"parameter {name}: values, {values!r}, must be a list of values, such as [1, 2];"
                " for one value write value: ..."
            )
        _check_probabilities(name, values, settings.get("probabilities"))
    for value in settings.get("values", [settings.get("value", 0)]):
        if _holds_none(value):
            raise UserError(
                f"parameter {name}: null reaches a run as the text None; leave the parameter out"
            )
        other = _other_kind(value)
        if other is not None:
            raise UserError(
                f"parameter {name}: {other!r} is neither a text, a number, true, false, a list nor"
                " a mapping of these; write it as a text"
            )
    for key in ("min", "max", "q", "mu", "sigma", "a", "b"):
        number = settings.get(key, 1)
        if isinstance(number, bool) or not isinstance(number, int | float):
            hint = "; YAML reads 1e-4 as text, write 1.0e-4" if isinstance(number, str) else ""
            raise UserError(f"parameter {name}: {key}, {number!r}, is not a number{hint}")
        if key in ("q", "sigma", "a", "b") and number <= 0:
            raise UserError(f"parameter {name}: {key}, {number}, is not above 0")
    if "min" in settings:
        low, high = settings["min"], settings["max"]
        if not low < high:
            raise UserError(f"parameter {name}: min, {low}, is not below max, {high}")
        if "values" in distribution and low <= 0:
            raise UserError(f"parameter {name}: min, {low}, is not above 0, as a logarithm needs")
        if distribution == "int_uniform" and not all(type(x) is int for x in (low, high)):
            raise UserError(f"parameter {name}: int_uniform, {low} to {high}, wants integers")


def _check_probabilities(name: str, values: list[Any], probabilities: Any) -> None:
    if probabilities is None:
        return
    numbers = isinstance(probabilities, list) and all(
        isinstance(p, int | float) and p >= 0 for p in probabilities
    )
    if not numbers or len(probabilities) != len(values) or not math.isclose(sum(probabilities), 1):
        raise UserError(
            f"parameter {name}: probabilities, {probabilities!r}, are not {len(values)} numbers "
            "that sum to 1, one for each of values"
        )


def _holds_none(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return value is None or (isinstance(value, list) and any(map(_holds_none, value)))


def _other_kind(value: Any) -> Any:
    """Return a part of the value that no override can give, such as bytes, or None."""
    if isinstance(value, dict):
        keys = [key for key in value if not isinstance(key, str | int | float)]
        value = [*keys, *value.values()]
    if isinstance(value, list):
        return next((part for part in map(_other_kind, value) if part is not None), None)
    return None if isinstance(value, str | int | float) else value
