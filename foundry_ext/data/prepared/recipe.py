"""Recipe of prepared data: what decides the tokens of a row, apart from the row."""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash
from datasets.fingerprint import Hasher
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.cache import DECIDING_PACKAGES, hash_tokenizer
from foundry_ext.data.config import Source
from foundry_ext.data.preprocessing import module_sources
from foundry_ext.data.token_columns import ids_type
from foundry_ext.utils.errors import UserError

_FORMAT_VERSION = 1  # of a shard's content


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Source, tokenizer and settings of prepared data."""

    source: str
    """The `hf_name` that was read, or the place of streams."""
    split: str | None
    revision: str | None
    """Commit of a hub's data set."""
    hf_kwargs: dict[str, Any]
    """Options of reading, without a token."""
    holdout: dict[str, Any] | None
    """The part of the rows that was prepared."""
    tokenizer: str
    """Its name in the YAML."""
    tokenizer_digest: str
    """Hash of vocabulary, merges, special tokens and chat template."""
    text_key: str | None
    """Column of plain text; None for prompt/response and chat rows."""
    target_prompts: str
    target_responses: str
    preprocessing_fn: str | None
    """Its name, for people; `preprocess_digest` decides."""
    preprocess_digest: str
    """Hash of the function's source and of the user's modules that it imports."""
    ids: str
    """Type of the token ids, uint16 or int32."""
    versions: dict[str, str]
    """Versions of the packages that decide the tokens."""

    @property
    def with_loss(self) -> bool:
        """Whether some tokens are not predicted."""
        return self.text_key is None

    @property
    def key(self) -> str:
        """Hash of everything that decides the tokens of a row."""
        fields = asdict(self)
        for name in ("source", "split", "revision", "hf_kwargs", "tokenizer", "preprocessing_fn"):
            del fields[name]
        text = json.dumps([_FORMAT_VERSION, fields], sort_keys=True)
        return xxhash.xxh3_128(text.encode()).hexdigest()

    def shard_key(self, content: str) -> str:
        """Return the key of the shard that a piece with this digest becomes."""
        return xxhash.xxh3_128(f"{self.key} {content}".encode()).hexdigest()


def make_recipe(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_name: str,
    revision: str | None,
    preprocessing_fn: Any,
) -> Recipe:
    """Return the recipe of a source as a loader would read it.

    Args:
        source: see `get_sources`.
        tokenizer: the run's tokenizer.
        tokenizer_name: its name in the YAML.
        revision: see `find_revision`.
        preprocessing_fn: the YAML's value.
    """
    settings = source.settings
    return Recipe(
        source=source.hf_name,
        split=source.split,
        revision=revision,
        hf_kwargs=without_token(source.options.get("hf_kwargs")),
        holdout=source.options.get("holdout"),
        tokenizer=tokenizer_name,
        tokenizer_digest=hash_tokenizer(tokenizer),
        text_key=settings.text_key,
        target_prompts=settings.target_prompts,
        target_responses=settings.target_responses,
        preprocessing_fn=None if preprocessing_fn is None else str(preprocessing_fn),
        preprocess_digest=digest_function(source.preprocess),
        ids=str(ids_type(max(tokenizer.get_vocab().values()))),
        versions={name: importlib.metadata.version(name) for name in DECIDING_PACKAGES},
    )


def without_token(hf_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of reading that may be kept."""
    return {key: value for key, value in (hf_kwargs or {}).items() if key != "token"}


def digest_function(function: Any) -> str:
    """Return a hash of a preprocessing function: its name, and its modules' sources."""
    return Hasher.hash([function, sorted(module_sources(function).items())])


def check_tokenizer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Check that data was prepared with the tokenizer of a run.

    Raises:
        UserError: it was prepared with another one.
    """
    if recipe.tokenizer_digest != hash_tokenizer(tokenizer):
        raise UserError(
            f"prepared: {place} was tokenised with another tokenizer or chat template,"
            f" {recipe.tokenizer}; name that one in tokenizer.name, or prepare the data again"
        )
