"""Rows as tokens: the chat template, the answer mask, and nothing left to learn from refused."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Attributes:
        input_ids: at most ``max_length`` of them.
        labels: a class index, or one target per token with ``IGNORE`` where nothing is learned.
    """

    input_ids: list[int]
    labels: int | list[int]


@dataclass(frozen=True)
class Encoded:
    """Rows as tokens, and how many rows had no token to learn from."""

    examples: list[Example]
    dropped: int


def encode(
    rows: Sequence[dict[str, Any]],
    form: str,
    tokenizer: Any,
    max_length: int,
    labels: Sequence[str] = (),
    where: str = "data",
) -> Encoded:
    """Tokenise rows of one form.

    Args:
        rows: canonical rows, see ``sources``.
        form: ``classification``, ``messages``, ``prompt`` or ``text``.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens a row is cut to, from the right.
        labels: the label set, for classification.
        where: named in errors.

    Raises:
        DataError: malformed messages, no chat template, or not one row with a token to learn from.
    """
    if not rows:
        return Encoded([], 0)
    if form == "classification":
        index = {label: i for i, label in enumerate(labels)}
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
        return Encoded([Example(i, index[row["label"]]) for i, row in zip(ids, rows, strict=True)], 0)
    spans = [_spans(row, form, tokenizer, where, number) for number, row in enumerate(rows)]
    # a rendered chat already has its special tokens; a prompt or text has none yet
    batch = tokenizer(
        [text for text, _ in spans],
        add_special_tokens=form != "messages",
        return_offsets_mapping=True,
        truncation=True,
        max_length=max_length,
    )
    examples = []
    for ids, offsets, (_, learned) in zip(batch["input_ids"], batch["offset_mapping"], spans, strict=True):
        targets = [
            token if end > start and any(a <= start < b for a, b in learned) else IGNORE
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        # the first token is predicted from nothing, so it is never a target
        if any(target != IGNORE for target in targets[1:]):
            examples.append(Example(list(ids), targets))
    if not examples:
        raise DataError(
            f"{where}: none of {len(rows)} rows has a token to learn from within data.max_length={max_length};"
            " raise data.max_length, or check that answers are not empty"
        )
    return Encoded(examples, len(rows) - len(examples))


def _spans(
    row: dict[str, Any], form: str, tokenizer: Any, where: str, number: int
) -> tuple[str, list[tuple[int, int]]]:
    """The row's whole text, and the character ranges to learn."""
    end = tokenizer.eos_token or ""
    if form == "text":
        text = row["text"] + end
        return text, [(0, len(text))]
    if form == "prompt":
        if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
            raise DataError(f"{where}: row {number}: prompt and completion must be text")
        text = row["prompt"] + row["completion"] + end
        return text, [(len(row["prompt"]), len(text))]
    return _chat_spans(row["messages"], tokenizer, f"{where}: row {number}")


def _chat_spans(messages: Any, tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """Every assistant turn with its end marker; the rest is context.

    A turn's range is what rendering it adds to the rendering of the turns before it, which holds for
    any template that writes turns in order.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: the model's tokenizer has no chat template; give rows as prompt and completion")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in messages
    ):
        raise DataError(f"{where}: messages must be a list of {{role, content}}, both text")
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        learned = []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
                through = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
                if not whole.startswith(through.rstrip()) or not through.startswith(before):
                    raise DataError(
                        f"{where}: the chat template rewrites earlier turns; give rows as prompt and completion"
                    )
                learned.append((len(before), len(through.rstrip())))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error
    return whole, learned
