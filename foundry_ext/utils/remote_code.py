"""Code that comes with a tokenizer, a model or a data set, which runs only if the YAML says so.

transformers and datasets ask at the terminal whether to run it if `trust_remote_code` is not given.
A command in a pipe, or one that is answered out of habit, would then run a stranger's code.
"""

from collections.abc import Mapping
from typing import Any

KEY = "trust_remote_code"


def code_only_if_trusted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with `trust_remote_code` off, unless it is literally true.

    An absent key, `null` and texts such as "yes" are all off.
    """
    return {**settings, KEY: settings.get(KEY) is True}
