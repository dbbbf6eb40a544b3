"""Settings that, with the tokenizer, decide the tokens of a row."""

from dataclasses import dataclass

from llmfoundry.data.finetuning.collator import validate_target_settings

from foundry_ext.utils.errors import UserError, one_line

OVERLONG = ("truncate", "split", "drop", "error")


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings:
    """Settings that, with the tokenizer, decide the tokens of a row."""

    max_seq_len: int
    """Most tokens of a document."""
    overlong: str = "truncate"
    """truncate: keep the beginning; split: pieces of max_seq_len; drop; error."""
    target_prompts: str = "none"
    """Prompts to predict: none, all, or length>=N."""
    target_responses: str = "last"
    """Responses to predict: last or all."""
    text_key: str | None = None
    """Column of plain text, all of it predicted; None for prompt/response and chat rows."""

    def __post_init__(self):
        if self.overlong not in OVERLONG:
            raise UserError(f"overlong: {self.overlong!r}; choose one of {', '.join(OVERLONG)}")
        if self.max_seq_len < 2:
            raise UserError(f"max_seq_len: {self.max_seq_len} leaves no token to predict")
        targets = self.target_prompts.lower(), self.target_responses.lower()
        try:
            validate_target_settings(*targets, decoder_only_format=True)
        except ValueError as error:  # names the key, the value and the known ones
            raise UserError(one_line(error)) from error
