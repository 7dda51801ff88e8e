"""Calibration examples: rows of text to token ids, of which the answer's are labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One teacher-forced sample: labels[i], unless it is IGNORED, is to be predicted from ids[:i].

    Attributes:
        ids: token ids.
        labels: as long as ids; usually the ids themselves where they count, as in an answer.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise ValueError(f"a sample needs a label per token id; got {len(self.ids)} ids, {len(self.labels)} labels")
        wrong = [label for label in self.labels if label < 0 and label != IGNORED]
        if wrong:
            raise ValueError(f"a label is a token id, or {IGNORED} where none counts; got {wrong[0]}")

    @classmethod
    def continuation(cls, ids: Sequence[int], prompt_length: int) -> Example:
        """The sample of which ids[prompt_length:] are the labels."""
        ids = tuple(ids)
        return cls(ids, (IGNORED,) * len(ids[:prompt_length]) + ids[prompt_length:])

    @property
    def n_labels(self) -> int:
        """Labels that have a token before them to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


def prompt_and_completion(question: str, answer: str) -> tuple[str, str]:
    """A question and its answer as a model has them, the completion without the end-of-sequence token."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def encode_question_answer(tokenizer: Any, question: str, answer: str) -> Example:
    """Prompt "Question: {q}", newline, "Answer:"; then " {a}" and the end-of-sequence token as labels.

    No token stands before the prompt, whose length is that of the prompt tokenised alone, as in the method's own
    calibration.
    """
    prompt, completion = prompt_and_completion(question, answer)
    full = f"{prompt}{completion}{tokenizer.eos_token or ''}"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Example.continuation(tokenizer(full, add_special_tokens=False)["input_ids"], len(prompt_ids))


def encode_messages(tokenizer: Any, messages: Any) -> Example:
    """A chat through the tokenizer's template; its last message, which must be the assistant's, is the label.

    Raises:
        ValueError: if this is no list of messages or the last one is not the assistant's, if the tokenizer has no
            chat template, or if the template does not render a conversation as a continuation of its own prompt.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    ):
        raise ValueError(f'a chat is a list of {{"role": ..., "content": ...}}; got {str(messages)[:60]!r}')
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError('a calibration chat must end with a message of role "assistant"')
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use question and answer columns instead")
    from jinja2 import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    if not full.startswith(prompt):
        raise ValueError("the chat template renders the conversation differently from its own prompt: no clear labels")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return Example.continuation(tokenizer(full, add_special_tokens=False)["input_ids"], len(prompt_ids))


def as_examples(data: Iterable[Example | Mapping[str, Any]]) -> list[Example]:
    """Samples as a training loop has them: rows of a data set, or batches of a loader.

    Args:
        data: examples, or mappings with `input_ids` and `labels` (-100 where none counts; the model shifts them, as
            those of transformers do), and perhaps `attention_mask`: lists, arrays or tensors of one dimension, or of
            two for a batch. Tokens whose mask is 0 are left out. Other columns play no part.

    Raises:
        TypeError: for something that is neither.
        ValueError: naming the item, for missing columns, lengths that differ, a mask with a hole or position ids
            that start again, which is several samples in one row.
    """
    examples: list[Example] = []
    for index, item in enumerate(data):
        if isinstance(item, Example):
            examples.append(item)
            continue
        if not isinstance(item, Mapping):
            raise TypeError(f"item {index} must be an Example or a mapping with input_ids; got {type(item).__name__}")
        try:
            examples += _from_columns(item)
        except ValueError as error:
            raise ValueError(f"item {index}: {error}") from error
    return examples


def _from_columns(item: Mapping[str, Any]) -> Iterator[Example]:
    import torch

    missing = [name for name in ("input_ids", "labels") if item.get(name) is None]
    if missing:
        raise ValueError(f"no {missing[0]}; it has {', '.join(item)}. Where every token counts, labels are input_ids")
    columns = {
        name: torch.as_tensor(item[name], device="cpu")
        for name in ("input_ids", "labels", "attention_mask", "position_ids")
        if item.get(name) is not None
    }
    columns = {name: column[None] if column.ndim == 1 else column for name, column in columns.items()}
    ids, labels = columns["input_ids"], columns["labels"]
    mask = columns.get("attention_mask", torch.ones_like(ids))
    positions = columns.get("position_ids", torch.arange(ids.shape[-1]).expand_as(ids))
    for name, column in columns.items():
        if column.shape != ids.shape or ids.ndim != 2:
            raise ValueError(f"{name} must be as long as input_ids; got {tuple(column.shape)}, {tuple(ids.shape)}")
    for row in range(len(ids)):
        text = mask[row].nonzero().squeeze(1)
        if len(text) and int(text[-1] - text[0]) + 1 != len(text):
            raise ValueError("attention_mask has a hole; 0 may only stand for padding at the ends")
        if (positions[row, text].diff() != 1).any():
            raise ValueError("position_ids start again within a row; give each sample a row of its own")
        yield Example(tuple(ids[row, text].tolist()), tuple(labels[row, text].tolist()))
