"""Special tokens that a tokenizer adds by itself: once, at the ends of a document.

Some tokenizers put tokens around every text they encode, such as Llama's `<s> $A`. A document is
encoded in parts, and a prompt has no end yet, so they are added here and not by the tokenizer.
Training, evaluation and sampling all use this module, so a model sees the same beginnings in each.

Example, a tokenizer that encodes "a" as `<s> a </s>`: the row {prompt: "a", response: "b"} is
`<s> a b </s>`, and the prompt of a sample is `<s> a`. SmolLM2's own tokenizers add nothing.
"""

from collections.abc import Sequence
from typing import Any, cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.utils.errors import UserError

_PROBE = "a"


class SpecialTokens:
    """Ids that a tokenizer puts around a text, and the end-of-text token.

    Attributes:
        begin: ids before a text.
        end: ids after a text.
        eos: the token that ends every document, added if `end` does not have it.

    Raises:
        UserError: the tokenizer adds tokens elsewhere than at the ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        alone, whole = (
            cast(list[int], tokenizer(_PROBE, add_special_tokens=add)["input_ids"])
            for add in (False, True)
        )
        starts = range(len(whole) - len(alone) + 1)
        found = [start for start in starts if whole[start : start + len(alone)] == alone]
        if not found:
            raise UserError(
                f"tokenizer: {_PROBE!r} is {alone} without special tokens and {whole} with them; a"
                " document needs a tokenizer that adds them at the ends of a text only"
            )
        self.begin, self.end = whole[: found[0]], whole[found[0] + len(alone) :]
        self.eos = cast(int, tokenizer.eos_token_id)
        self._tokenizer: Any = tokenizer
        self._is_blank: dict[int, bool] = {}

    def opened(self, ids: list[int]) -> list[int]:
        """Return the ids with `begin` before them, unless the text began with it."""
        return ids if ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def closed(self, ids: list[int]) -> list[int]:
        """Return the ids with `end` and `eos` after them, each unless it is there."""
        if ids[-1:] == [self.eos]:
            return ids
        if ids[len(ids) - len(self.end) :] != self.end:
            ids = [*ids, *self.end]
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]

    def is_closed(self, ids: Sequence[int]) -> bool:
        """Return whether `eos` is the last token but white space, as many chat templates end."""
        for token in reversed(ids):
            if token == self.eos:
                return True
            if token not in self._is_blank:
                self._is_blank[token] = not self._tokenizer.decode([token]).strip()
            if not self._is_blank[token]:
                return False
        return False

    def describe(self) -> str:
        """Return `a row begins with <s> and ends with </s>`."""
        begin, end = (
            " ".join(self._tokenizer.convert_ids_to_tokens(ids))
            for ids in (self.begin, self.closed(self.end))
        )
        opened = f"begins with {begin} and " if begin else ""
        return f"a row {opened}ends with {end}"


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands for an empty context: begin of text, or else end of text."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return cast(int, eos if bos is None else bos)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text as the beginning of a document, for the model to continue."""
    # Not verbose: a text longer than the tokenizer's model_max_length is fine, it is cut later.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)
    special = SpecialTokens(tokenizer)
    return [special.opened(ids) for ids in cast(list[list[int]], encoded["input_ids"])]


class WithoutSpecialTokens:
    """A tokenizer that adds no special tokens, for code that would let it add them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer: Any = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked by pickle, before there is a tokenizer
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **settings: Any) -> Any:
        return self._tokenizer(*texts, **{**settings, "add_special_tokens": False})
