"""Chats are sliced as llm-foundry does it, with one look at the tokenizer."""

import pytest
from llmfoundry.data.finetuning import tasks
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from foundry_ext.data.chats import ChatSlicer

USER, ASSISTANT = ({"role": role, "content": f" {role} "} for role in ("user", "assistant"))
SYSTEM = {"role": "system", "content": "{{ bos_token }}"}
ROWS = [{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT] * 3}]
LOOP = "{% for m in messages %}{{ m.role }}:{{ m['content'] }}\n{% endfor %}"
TEMPLATES = {
    "special tokens": "{{ bos_token }}{{ unk_token }}" + LOOP + "{{ eos_token if false }}",
    "date": "{{ date_string }}" + LOOP,
    "no tools": "{{ tools is none }}{{ documents is none }}" + LOOP,
    "globals": "{{ namespace(a=1).a }}{{ messages[0] | tojson }}" + LOOP,
    "prompt": LOOP + "{% if add_generation_prompt %}assistant:{% endif %}",
}


def theirs(row, tokenizer) -> list[str]:
    return [text for turn in tasks._slice_chat_formatted_example(row, tokenizer) for text in turn]


@pytest.mark.parametrize("name", [*TEMPLATES, "several", "none"])
def test_texts_are_llm_foundrys(tokenizer, name: str):
    template = {"default": TEMPLATES["prompt"], "other": "x"} if name == "several" else None
    tokenizer.chat_template = TEMPLATES.get(name, template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    slicer = ChatSlicer(tokenizer)
    for row in ROWS:
        assert slicer(row) == theirs(row, tokenizer)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{{ raise_exception('no') }}", [USER, ASSISTANT]),
        ("{{ messages | length }}", [USER, ASSISTANT]),
        (LOOP, [ASSISTANT, USER]),
        (LOOP, [ASSISTANT, USER, ASSISTANT]),  # nothing comes before the first answer
    ],
)
def test_errors_are_llm_foundrys(tokenizer, template: str, messages):
    tokenizer.chat_template, row = template, {"messages": messages}
    with pytest.raises(Exception) as own:
        ChatSlicer(tokenizer)(row)
    with pytest.raises(type(own.value)) as other:
        theirs(row, tokenizer)
    assert str(own.value) == str(other.value)


def test_the_special_tokens_are_collected_once(tokenizer, monkeypatch):
    """Transformers does it for each of two renderings per answer, slower than it renders."""
    collected, get = [], PreTrainedTokenizerBase.special_tokens_map.fget
    assert get is not None
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "special_tokens_map",
        property(lambda self: (collected.append(1), get(self))[1]),
    )
    slicer = ChatSlicer(tokenizer)
    for _ in range(3):
        slicer(ROWS[1])
    assert len(collected) == 1


def test_a_method_of_the_tokenizers_own_is_heeded(tokenizer):
    class Shouting(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):  # pyright: ignore
            return str(super().apply_chat_template(*args, **kwargs)).upper()

    tokenizer.__class__ = Shouting
    texts = ChatSlicer(tokenizer)(ROWS[0])
    assert texts == theirs(ROWS[0], tokenizer)
    assert "USER" in texts[0]
