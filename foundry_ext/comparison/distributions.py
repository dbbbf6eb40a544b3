"""Student's t and the normal distribution, in numpy and the standard library alone."""

import math
from statistics import NormalDist

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


def normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def normal_cdf(z: float) -> float:
    return NormalDist().cdf(z)


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's t with `df` >= 1 degrees of freedom, whole or not.

    With t = sqrt(df) tan(a) the density becomes cos(a)^(df - 1), which is smooth on the finite
    interval, so Gauss-Legendre quadrature is exact to rounding; far tails keep 1e-12 absolute.
    """
    if df < 1:
        raise ValueError(f"degrees of freedom must be at least 1, not {df}")
    if math.isinf(t):
        return float(t > 0)
    # Beyond this the density is below double precision's reach and the interval only grows.
    end = min(math.atan(abs(t) / math.sqrt(df)), 40 / math.sqrt(df), math.pi / 2)
    angles = end * (_NODES + 1) / 2
    integral = end / 2 * float(_WEIGHTS @ np.cos(angles) ** (df - 1))
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    half = min(constant * integral, 0.5)
    return 0.5 + math.copysign(half, t)


def t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|)."""
    return min(1.0, max(0.0, 2 * (1 - t_cdf(abs(t), df))))


def t_quantile(probability: float, df: float) -> float:
    """The t with P(T <= t) = `probability`: Newton's method, kept inside a shrinking bracket."""
    if not 0 < probability < 1:
        raise ValueError(f"a probability lies between 0 and 1, not at {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        low, high = high, high * 2
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi * df) / 2
    t = (low + high) / 2
    for _ in range(100):
        excess = t_cdf(t, df) - probability
        low, high = (low, t) if excess > 0 else (t, high)
        density = math.exp(constant - (df + 1) / 2 * math.log1p(t * t / df))
        step = t - excess / density
        step = step if low < step < high else (low + high) / 2
        if abs(step - t) <= 1e-12 * (1 + t):
            return step
        t = step
    return t
