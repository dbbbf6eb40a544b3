"""Methods and noise with known truth, from which the simulation draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Method:
    """True means by learning rate, in nats per token, and scales of noise by learning rate."""

    learning: Sequence[float]
    forgetting: Sequence[float]
    scale: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
    """Factor on the noise of seeds at each learning rate."""


@dataclass(frozen=True)
class Noise:
    """Standard deviations: a seed's are of a run's mean, an item's of that item's value."""

    data_order: float = 0.03
    """Effect of a seed on all methods and rates alike."""
    seed: float = 0.05
    """Effect of a seed on one method at all rates alike."""
    run: float = 0.05
    """Effect of each run alone."""
    item: float = 1.0
    """Effect of an item on all runs alike."""
    response: float = 0.5
    """Effect of an item on all seeds of one method at one rate."""
    rest: float = 0.5
    """Effect of each run alone on each item."""
    coupling: float = 0.7
    """Share of a run's noise in learning that appears in its forgetting too."""


@dataclass(frozen=True)
class Truth:
    """Methods and noise to draw from."""

    methods: Mapping[str, Method]
    noise: Noise = field(default_factory=Noise)


_ADAPTER = Method((1.6, 2.6, 3.2, 3.5), (0.3, 0.8, 1.7, 2.9))
_FULL = Method((2.4, 3.3, 3.9, 4.1), (0.5, 1.3, 2.6, 4.5))
_PLATEAU = Method((2.0, 3.0, 3.02, 3.0), (0.5, 1.0, 1.02, 3.0))
_TIED = Method((3.0, 3.0, 3.0, 3.0), (1.0, 1.0, 1.0, 1.0))
_FLOOR = Method((0.0, 0.0, 0.0, 0.0), (0.3, 0.6, 0.9, 1.2))
_SEEDS = Noise(seed=0.15, run=0.15, item=0.3, response=0.2, rest=0.2)
_ITEMS = Noise(data_order=0, seed=0.003, run=0.003, item=1.0, response=1.0, rest=0.05)
_REST = Noise(data_order=0, seed=0, run=0, item=0.3, response=0, rest=2.0)


def _two(first: Method, second: Method | None = None) -> dict[str, Method]:
    return {"A": first, "B": second or first}


TRUTHS = {
    "equal": Truth(_two(_ADAPTER)),
    "different": Truth(_two(_FULL, _ADAPTER)),
    "equal, seeds decide": Truth(_two(_ADAPTER), _SEEDS),
    "different, seeds decide": Truth(_two(_FULL, _ADAPTER), _SEEDS),
    "equal, items decide": Truth(_two(_ADAPTER), _ITEMS),
    "different, items decide": Truth(_two(_FULL, _ADAPTER), _ITEMS),
    "equal, noise of runs on items": Truth(_two(_ADAPTER), _REST),
    "equal, noisier at high rates": Truth(_two(replace(_ADAPTER, scale=(0.3, 1, 3, 6)))),
    "different, noisier at high rates": Truth(
        _two(replace(_FULL, scale=(0.3, 1, 3, 6)), replace(_ADAPTER, scale=(0.3, 1, 2, 3)))
    ),
    "equal, plateau": Truth(_two(_PLATEAU)),
    "equal, all rates tied": Truth(_two(_TIED), _SEEDS),
    "equal, nothing learned": Truth(_two(_FLOOR)),
    "nothing learned by one": Truth(_two(_ADAPTER, _FLOOR)),
    "four equal methods": Truth(dict.fromkeys("ABCD", _ADAPTER)),
}
