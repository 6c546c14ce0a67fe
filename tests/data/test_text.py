"""Tokens and the answer mask."""

import pytest
from transformers import AutoTokenizer

from fedlora.data.text import IGNORE, encode
from fedlora.errors import DataError
from fedlora.training.builtin import resolve


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("builtin:tiny-llama"))


def learned(example, tokenizer) -> str:
    return tokenizer.decode([t for t in example.labels if t != IGNORE])


def test_only_assistant_turns_and_their_end_are_learned(tokenizer) -> None:
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "and?"), ("assistant", "done")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (example,) = encode(rows, "messages", tokenizer, 200).examples
    assert tokenizer.decode(example.input_ids) == "<user>hi<end><assistant>yo<end><user>and?<end><assistant>done<end>"
    assert learned(example, tokenizer) == "yo<end>done<end>"


def test_a_prompt_is_context_and_its_completion_is_learned(tokenizer) -> None:
    (example,) = encode([{"prompt": "2+2=", "completion": "4"}], "prompt", tokenizer, 50).examples
    assert learned(example, tokenizer) == "4<end>"


def test_plain_text_is_learned_whole(tokenizer) -> None:
    (example,) = encode([{"text": "abc"}], "text", tokenizer, 50).examples
    assert learned(example, tokenizer) == "abc<end>"


def test_rows_without_a_token_to_learn_are_counted_and_refused_if_none_is_left(tokenizer) -> None:
    long, short = {"prompt": "x" * 99, "completion": "y"}, {"prompt": "x", "completion": "y"}
    encoded = encode([long, short], "prompt", tokenizer, 20)
    assert (len(encoded.examples), encoded.dropped) == (1, 1)
    with pytest.raises(DataError, match=r"none of 1 rows .* raise data.max_length"):
        encode([long], "prompt", tokenizer, 20)


@pytest.mark.parametrize("messages", ["text", [{"role": "user"}], [{"content": "x"}], [1]])
def test_malformed_messages_are_refused(tokenizer, messages: object) -> None:
    with pytest.raises(DataError, match="row 0: messages must be"):
        encode([{"messages": messages}], "messages", tokenizer, 50)


def test_classification_rows_carry_the_index_of_their_label(tokenizer) -> None:
    rows = [{"text": "a", "label": "y"}, {"text": "b", "label": "x"}]
    assert [e.labels for e in encode(rows, "classification", tokenizer, 9, ("x", "y")).examples] == [1, 0]
