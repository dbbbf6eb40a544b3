"""Properties for any text: tokens decode to it, and exactly the learned part carries loss."""

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="run `make install`")

from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from foundry_ext.data.tokenize import RowReader, TokenizeSettings
from tests.conftest import SPECIAL_TOKENS, WORDS
from tests.properties import examples

# Any character that UTF-8 can write, and what a tokenizer might take for something else.
PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from([*SPECIAL_TOKENS, *WORDS, " ", "  ", "\n", "\r\n", "\0", "\ufeff", "é", "é"]),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
ROWS = st.fixed_dictionaries({"prompt": TEXTS, "response": TEXTS})
END = SPECIAL_TOKENS[0]


@pytest.fixture(scope="module")
def reader_of(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return lambda **settings: RowReader(tokenizer, TokenizeSettings(max_seq_len=9, **settings))


def say(reader: RowReader, ids) -> str:
    return reader.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@examples(200)
@given(ROWS)
def test_the_response_and_it_alone_is_learned(reader_of, row):
    reader = reader_of()
    # llm-foundry takes the second of two for one that the tokenizer put there (BOS is END here).
    assume(not all(text.startswith(END) for text in row.values()))
    tokens = reader.read(row)
    if not row["prompt"] or not row["response"]:
        assert len(tokens.input_ids) == 0
        return
    response = row["response"] + ("" if row["response"].endswith(END) else END)
    assert say(reader, tokens.input_ids) == row["prompt"] + response
    assert say(reader, tokens.input_ids[tokens.loss_mask]) == response
    (changes,) = (np.flatnonzero(np.diff(tokens.loss_mask)).tolist(),)
    assert len(changes) == 1 and tokens.loss_mask[-1], "a prompt, then a response to the end"
    every = reader_of(target_prompts="all").read(row)
    assert every.input_ids.tolist() == tokens.input_ids.tolist() and every.loss_mask.all()


@examples(200)
@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_plain_text_is_learned_whole_and_closed_once(reader_of, texts):
    reader = reader_of(text_key="text")
    rows = [{"text": text} for text in texts]
    together = reader.read_batch(rows)
    assert together is not None
    for text, one, row in zip(texts, together, rows, strict=True):
        alone = reader.read(row)
        assert one.input_ids.tolist() == alone.input_ids.tolist()
        assert one.loss_mask.all()
        closed = text if text.endswith(END) or not text else text + END
        assert say(reader, one.input_ids) == closed


@examples(150)
@given(st.lists(ROWS, min_size=1, max_size=6), st.sampled_from(["none", "all", "length>=3"]))
def test_rows_read_together_are_as_read_alone(reader_of, rows, target):
    reader = reader_of(target_prompts=target)
    together = reader.read_batch(rows)
    assert together is not None
    for one, row in zip(together, rows, strict=True):
        alone = reader.read(row)
        assert one.input_ids.tolist() == alone.input_ids.tolist()
        assert one.loss_mask.tolist() == alone.loss_mask.tolist()


MESSAGES = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@examples(100)
@given(MESSAGES, st.sampled_from(["last", "all"]))
def test_of_a_chat_the_answers_are_learned(reader_of, turns, target):
    reader = reader_of(target_responses=target)
    names = ("user", "assistant")
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(names, turn, strict=True)
    ]
    tokens = reader.read({"messages": messages})
    learned = say(reader, tokens.input_ids[tokens.loss_mask])
    answers = [answer for _, answer in turns]
    wanted = answers if target == "all" else answers[-1:]
    assert learned.removesuffix(END) == "".join(f"{answer}<|im_end|>\n" for answer in wanted)
    whole = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    assert say(reader, tokens.input_ids).removesuffix(END) == whole
