"""Settings of the property tests: the same examples every time, none stored on disk.

    @examples(200)
    @given(...)

`hypothesis` draws examples that are small and odd (none, one, equal ones, the largest) far more
often than chance would, and reports the smallest one that fails.
"""

from hypothesis import HealthCheck, settings


def examples(number: int) -> settings:
    """So many examples; derandomised, so that a change that passes here passes everywhere."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
