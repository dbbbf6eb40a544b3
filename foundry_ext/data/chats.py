"""A tokenizer's chat template, for llm-foundry's slicing of chats into prompts and responses."""

from typing import Any, cast

from llmfoundry.data.finetuning.tasks import _slice_chat_formatted_example
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template


class ChatSlicer:
    """llm-foundry's slicing of chats, with less work around the template.

    llm-foundry renders a chat twice per response, and transformers collects the special tokens'
    names anew each time, which takes longer than rendering. Here that is done once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer: Any = tokenizer
        self.chat_template = tokenizer.chat_template
        self._special = dict(tokenizer.special_tokens_map)
        self._compiled: dict[str | None, Any] = {}

    def __call__(self, row: dict[str, Any]) -> list[str]:
        """Return prompt, response, prompt, response, ... of a chat.

        Raises:
            Exception: one of llm-foundry's, about a bad row.
        """
        # A class with a method of its own may do more than its template.
        method = getattr(type(self._tokenizer), "apply_chat_template", None)
        is_plain = method is PreTrainedTokenizerBase.apply_chat_template
        tokenizer = self if is_plain else self._tokenizer
        turns = _slice_chat_formatted_example(cast(Any, row), cast(Any, tokenizer))
        return [text for turn in turns for text in turn]

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        chat_template: str | None,
        tokenize: bool,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Render as the tokenizer's method does, which llm-foundry calls with these arguments."""
        assert not tokenize
        conversation[0]  # of an empty one, the same error
        if chat_template not in self._compiled:
            template = _compile_jinja_template(self._tokenizer.get_chat_template(chat_template))
            fixed = {**template.globals, "tools": None, "documents": None, **self._special}
            self._compiled[chat_template] = template, fixed
        template, fixed = self._compiled[chat_template]
        own = {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        # As in template.render, which also copies all globals one by one.
        context = template.new_context({**fixed, **own, **variables}, shared=True)
        return "".join(template.root_render_func(context))
