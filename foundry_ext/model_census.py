"""Keeps Composer from importing every language model of transformers when it is given one."""

import contextlib
from collections.abc import Iterator

import composer.models.huggingface


@contextlib.contextmanager
def no_model_census() -> Iterator[None]:
    """Within it `HuggingFaceModel` takes its model for a causal language model unseen.

    Composer 0.32 asks transformers for all classes of causal language models, 109 modules and a
    second of CPU at every start, to choose a default for `shift_labels`, and to warn where that is
    false. Who says `shift_labels: true` needs neither.
    """
    module, name = composer.models.huggingface, "_is_registered_causal_lm"
    original = getattr(module, name, None)
    if original is None:  # another version, which may not do so
        yield
        return
    setattr(module, name, lambda model: True)
    try:
        yield
    finally:
        setattr(module, name, original)
