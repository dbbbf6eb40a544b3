"""Special tokens of a tokenizer: once, at the ends of a document, and the same in every use."""

import numpy as np
import pytest
from tokenizers import processors

from foundry_ext.data.special_tokens import SpecialTokens, encode_prompts
from foundry_ext.data.tokenize import RowReader, TokenizeSettings
from foundry_ext.evaluation.multiple_choice import encode

START, END, SEPARATOR = 1, 0, 2  # <|im_start|>, <|endoftext|> (the end of text), <|im_end|>
NAMES = {START: "<|im_start|>", END: "<|endoftext|>", SEPARATOR: "<|im_end|>"}
# What a tokenizer adds: before and after every text, and after it in a document.
KINDS = {
    "nothing": ([], [], [END]),
    "a start, as Llama's": ([START], [], [END]),
    "an end, as T5's": ([], [END], [END]),
    "both": ([START], [END], [END]),
    "others, as BERT's": ([START], [SEPARATOR], [SEPARATOR, END]),
    "a start that is the end": ([END], [], [END]),
}
ROWS = {
    "prompts": [{"prompt": "a bird:", "response": " one 12"}, {"prompt": "2", "response": "~"}],
    "text": [{"text": "a bird: one 12"}, {"text": "stone"}],
    "chat": [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, "abcd", strict=False)]}
        for roles in (("user", "assistant") * 2, ("system", "user", "assistant"))
    ],
}
# As the stories of a template that writes no special token.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(params=KINDS)
def adding(request, tokenizer):
    """Return (tokenizer, begin, end): a tokenizer that adds these to every text."""
    begin, after, end = KINDS[request.param]
    text = " ".join([*(NAMES[i] for i in begin), "$A", *(NAMES[i] for i in after)])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=text, special_tokens=[(name, token) for token, name in NAMES.items()]
    )
    tokenizer.bos_token = NAMES[START]
    assert tokenizer("a")["input_ids"] == [*begin, *plain(tokenizer, "a"), *after]
    return tokenizer, begin, end


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reader_of(tokenizer, kind: str, **settings) -> RowReader:
    text_key = "text" if kind == "text" else None
    return RowReader(tokenizer, TokenizeSettings(max_seq_len=99, text_key=text_key, **settings))


@pytest.mark.parametrize("kind", ROWS)
def test_once_at_the_ends_of_a_document(adding, kind: str):
    tokenizer, begin, end = adding
    tokenizer.chat_template = TEMPLATE
    together = reader_of(tokenizer, kind).read_batch(ROWS[kind])
    for row, tokens in zip(ROWS[kind], together, strict=True):
        alone = reader_of(tokenizer, kind).read(row)
        assert all(map(np.array_equal, alone, tokens))
        ids = tokens.input_ids.tolist()
        assert ids[: len(begin)] == begin and ids[len(ids) - len(end) :] == end
        inside = ids[len(begin) : len(ids) - len(end)]
        assert not set(inside) & set(NAMES)
        text = row.get("text") or row.get("prompt", "") + row.get("response", "")
        if kind == "chat":
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(inside) == text
        learned = tokens.loss_mask
        assert learned[-len(end) :].all()
        assert kind == "text" or not learned[: len(begin) + 1].any()


@pytest.mark.parametrize("kind", ["text", "prompts"])
def test_a_text_that_has_them_gets_no_second_one(adding, kind: str):
    tokenizer, begin, end = adding
    text = "".join(NAMES[i] for i in begin) + "a bird"
    closing = "".join(NAMES[i] for i in end)
    row = (
        {"text": text + closing} if kind == "text" else {"prompt": text, "response": f"~{closing}"}
    )
    ids = reader_of(tokenizer, kind).read(row).input_ids.tolist()
    middle = plain(tokenizer, "a bird") + ([] if kind == "text" else plain(tokenizer, "~"))
    assert ids == [*begin, *middle, *end]


def test_evaluation_and_sampling_begin_as_training_does(adding):
    tokenizer, begin, _ = adding
    row = {"prompt": "one stone:", "response": " two"}
    document = reader_of(tokenizer, "prompts").read(row).input_ids.tolist()
    (prompt,) = encode_prompts(tokenizer, [row["prompt"]])
    assert prompt == [*begin, *plain(tokenizer, row["prompt"])] == document[: len(prompt)]
    (choice, unasked), _ = encode(
        tokenizer, [(row["prompt"], row["response"]), ("", " two")], max_length=50
    )
    assert choice.input_ids.tolist() == document[: len(choice.input_ids)]
    assert choice.input_ids[choice.loss_mask].tolist() == plain(tokenizer, " two")
    start = begin or [START]  # something that a first token can be predicted from
    assert unasked.input_ids.tolist() == [*start, *plain(tokenizer, " two")]
    assert unasked.input_ids[unasked.loss_mask].tolist() == plain(tokenizer, " two")


def test_they_are_described(adding):
    tokenizer, begin, end = adding
    text = SpecialTokens(tokenizer).describe()
    assert ("begins with" in text) == bool(begin)
    assert text.endswith("ends with " + " ".join(NAMES[i] for i in end))


def test_a_tokenizer_that_adds_inside_is_refused():
    class Between:
        eos_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [5, 1, 6] if add_special_tokens else [5, 6]}

    with pytest.raises(ValueError, match=r"tokenizer: 'a' is \[5, 6\] .* \[5, 1, 6\]"):
        SpecialTokens(Between())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tail", ["", "\n", " \n\n"])
@pytest.mark.parametrize("target", ["last", "all"])
def test_a_chat_that_its_template_closes_is_closed_once(tokenizer, tail: str, target: str):
    """As SmolLM2-Instruct's, whose template ends with its end of text and a line break."""
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>' + '\n'", f"'<|im_end|>' + {tail!r}"
    )
    reader = reader_of(tokenizer, "chat", target_responses=target)
    together = reader.read_batch(ROWS["chat"])
    for row, tokens in zip(ROWS["chat"], together, strict=True):
        assert all(map(np.array_equal, reader.read(row), tokens))
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokens.input_ids.tolist() == plain(tokenizer, text)
        ends = tokens.loss_mask & (tokens.input_ids == tokenizer.eos_token_id)
        num_answers = sum(m["role"] == "assistant" for m in row["messages"])
        assert ends.sum() == (num_answers if target == "all" else 1)
        assert tokens.num_untrained == (0 if target == "all" else num_answers - 1)
