"""A record of data, however its keys are called, becomes a text, a conversation or token ids.

What a record holds beyond that is counted by its key, never dropped without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.data.json_records import is_message
from ms_quant.data.messages import (
    ASSISTANT,
    SYSTEM,
    USER,
    Conversation,
    Message,
    are_messages,
    is_empty,
    json_type,
    read_messages,
    read_string,
    read_tools,
)
from ms_quant.errors import BadFileError

CONTEXT_KEYS = ("input", "context")
ANSWER_KEYS = ("answer", "completion", "response", "output")
ELSE_ANSWER_KEYS = ("answers", "target", "chosen")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")

MOST_SHOWN = 8

Content = str | Conversation | np.ndarray


class Record:
    """An object of a file, which remembers what of it was read.

    Args:
        value (dict): the object.
        where (str): names it in errors.
    """

    def __init__(self, value: dict[str, Any], where: str):
        self.value, self.where = value, where
        self.read: set[str] = set()
        self.parts_unused: set[str] = set()

    def holds(self, key: str) -> bool:
        """Whether there is anything under a key."""
        return not is_empty(self.value.get(key))

    def get(self, key: str) -> Any:
        """What is under a key, which counts as used."""
        self.read.add(key)
        return self.value.get(key)

    def text(self, key: str) -> str:
        return read_string(self.get(key), key, self.where)

    def messages(self, key: str) -> list[Message]:
        return read_messages(self.get(key), f"{self.where}: {key}", self.parts_unused)

    def unused(self) -> set[str]:
        """Keys that hold something that was not read."""
        whole = {key for key in self.value.keys() - self.read if self.holds(key)}
        return whole | self.parts_unused


def parse_record(value: Any, where: str, unused: Counter[str] | None = None) -> Content | None:
    """What a record holds.

    Args:
        value (Any): the record, from JSON or Parquet.
        where (str): names it in errors.
        unused (Counter, optional): counts the keys whose values are no part of that. Default:
            ``None``, nobody asks.

    Returns:
        str, Conversation, or int64 ids of one dimension. None if it is empty.

    Raises:
        MsQuantError: it has none of the known keys, or what one holds is of the wrong type.
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, list):
        value = _as_object(value, where)
    if not isinstance(value, dict):
        raise BadFileError(f"{where} is a JSON {json_type(value)}, expected an object or a string")
    beside: set[str] = set()
    if "row_idx" in value and isinstance(value.get("row"), dict):
        around, value = value, value["row"]
        beside = {f"{k} beside row" for k in around.keys() - {"row", "row_idx"} if around[k]}
    record = Record(value, where)
    record.parts_unused |= beside
    known = [kind for kind in KINDS for key in kind.keys if key in value]
    if not known:
        raise BadFileError(
            f"{where} has the keys {sorted(map(str, value))!r:.80}, expected one of "
            f"{', '.join(RECORD_KEYS)}"
        )
    held = [(kind, key) for kind in known for key in kind.keys if record.holds(key)]
    content = None
    if held:
        kind, key = held[0]
        content = kind.read(record, key)
    if unused is not None:
        unused.update(record.unused())
    return content


def _as_object(value: list[Any], where: str) -> dict[str, Any]:
    if all(type(item) is int for item in value):
        return {"input_ids": value}
    if is_message(value[0]):
        return {"messages": value}
    raise BadFileError(
        f"{where} is a list of JSON {json_type(value[0])}, expected an object, a string, a list of "
        "messages or of token ids"
    )


def _text(record: Record, key: str) -> str:
    if is_message(record.value):
        raise BadFileError(
            f'{record.where} is a single message, expected a conversation: {{"messages": [...]}}'
        )
    return record.text(key)


def _conversation(record: Record, key: str) -> Conversation:
    found = record.messages(key)
    if record.holds("chosen") and found[-1]["role"] != ASSISTANT:
        found = _with_answer(found, _told(record, "chosen"))
    return _finish(record, found)


def _question(record: Record, key: str) -> Content:
    """A question with what stands before it, its context and its answer."""
    context = [k for k in CONTEXT_KEYS if k != key and record.holds(k)]
    answers = [k for k in ANSWER_KEYS if k != key and record.holds(k)]
    if len(answers) > 1:
        raise BadFileError(
            f"{record.where} has {' and '.join(answers)}, expected one answer to {key}"
        )
    answers = answers or [k for k in ELSE_ANSWER_KEYS if record.holds(k)][:1]
    whole = [key, *answers, *(["history"] if record.holds("history") else [])]
    if any(are_messages(record.value[k]) or is_message(record.value[k]) for k in whole):
        found = (
            record.messages(key)
            if isinstance(record.value[key], list)
            else _asked(record, key, context)
        )
        for name in answers:
            found = _with_answer(found, _told(record, name))
        return _finish(record, [*_past(record), *found])
    texts = [record.text(key), *(_passages(record, k) for k in context)]
    for name in answers:
        said = _answer(record, name)
        texts = (
            [said]
            if name == "chosen" and not context and said.startswith(texts[0])
            else [*texts, said]
        )
    past = [str(message["content"]) for message in _past(record)]
    return _join([*_system(record), *past, *filter(None, texts)])


def _asked(record: Record, key: str, context: Sequence[str]) -> list[Message]:
    texts = [record.text(key), *(_passages(record, k) for k in context)]
    return [{"role": USER, "content": _join(texts)}]


def _passages(record: Record, key: str) -> str:
    """A context: a text, or a list of them."""
    value = record.value[key]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        record.read.add(key)
        return _join(value)
    return record.text(key)


def _told(record: Record, key: str) -> list[Message]:
    """An answer as messages."""
    value = record.value[key]
    if is_message(value):
        record.read.add(key)
        return read_messages([value], f"{record.where}: {key}", record.parts_unused)
    if are_messages(value):
        return record.messages(key)
    said = _answer(record, key)
    return [{"role": ASSISTANT, "content": said}] if said else []


def _with_answer(asked: list[Message], told: list[Message]) -> list[Message]:
    """Both, unless the answer repeats the question, as some data sets of preferences do."""
    start = sum(message["role"] == SYSTEM for message in told[:1])
    return told if told[start : start + len(asked)] == asked else [*asked, *told]


def _answer(record: Record, key: str) -> str:
    """The text of an answer, "" where there is none: the first of several.

    Raises:
        MsQuantError: it has another type, under a key that has held nothing else but texts.
    """
    value, name = record.value[key], key
    while isinstance(value, (dict, list)) and value:
        if isinstance(value, list):
            if any(item != value[0] for item in value[1:]):
                record.parts_unused.add(f"{name}[1:]")
            value = value[0]
            continue
        inner = next((k for k in ("text", "value") if k in value), None)
        if inner is None:
            break
        others = [k for k in value if k != inner and not is_empty(value[k])]
        record.parts_unused |= {f"{name}.{k}" for k in others}
        value, name = value[inner], f"{name}.{inner}"
    if isinstance(value, str) or is_empty(value):
        record.read.add(key)
        return value or ""
    return "" if key in ELSE_ANSWER_KEYS else record.text(key)


def _past(record: Record) -> list[Message]:
    """The turns before a question: messages, or a list of texts for each turn."""
    history = record.value.get("history")
    if are_messages(history):
        return record.messages("history")
    if not isinstance(history, list) or not all(isinstance(turn, list) for turn in history):
        return []
    if not all(text is None or isinstance(text, str) for turn in history for text in turn):
        return []
    record.read.add("history")
    said = [(i, text) for turn in history for i, text in enumerate(turn) if not is_empty(text)]
    return [{"role": (USER, ASSISTANT)[i % 2], "content": text} for i, text in said]


def _system(record: Record) -> list[str]:
    key = next((key for key in SYSTEM_KEYS if record.holds(key)), None)
    return [] if key is None else [record.text(key)]


def _finish(record: Record, messages: list[Message]) -> Conversation:
    """A conversation with the system's message and the tools that stand beside it."""
    if messages[0]["role"] != SYSTEM:
        messages = [*({"role": SYSTEM, "content": text} for text in _system(record)), *messages]
    return Conversation(messages, read_tools(record.get("tools"), record.where))


def _preferred(record: Record, key: str) -> Content:
    """An answer that the question is part of."""
    value = record.value[key]
    return _finish(record, record.messages(key)) if are_messages(value) else record.text(key)


def _ids(record: Record, key: str) -> np.ndarray:
    """Token ids, without those that the attention mask leaves out."""
    ids, mask, where = record.get(key), record.get("attention_mask"), record.where
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise BadFileError(f"{where}: {key}, expected a list of whole numbers")
    try:
        found = np.array(ids, np.int64)
    except OverflowError:
        raise BadFileError(f"{where}: {key} holds a number beyond 64 bits") from None
    if mask is None:
        return found
    if not isinstance(mask, list) or len(mask) != len(ids) or not set(mask) <= {0, 1}:
        raise BadFileError(f"{where}: attention_mask, expected {len(ids)} of 0 or 1")
    return found[np.array(mask, bool)]


def _join(texts: list[str]) -> str:
    """Texts touch where one of them brings white space, else each is on a new line."""
    joined = ""
    for text in texts:
        apart = not joined or joined[-1:].isspace() or text[:1].isspace()
        joined += text if apart else f"\n{text}"
    return joined


@dataclass(frozen=True)
class RecordKind:
    """A row of the table of records; of several in one record the first with a value counts.

    Attributes:
        keys: any of them makes a record of this kind.
        read: what the record holds, given it and the key.
        becomes: in the documentation, what is made of it.
    """

    keys: tuple[str, ...]
    read: Callable[[Record, str], Content]
    becomes: str


KINDS = (
    RecordKind(("text",), _text, "running text"),
    RecordKind(
        ("messages", "conversations", "conversation"),
        _conversation,
        "a conversation of `role` and `content`, or `from` and `value`, through the chat template; "
        "with `system`, `system_prompt` or `system_message`, `tools`, and `chosen` as its answer",
    ),
    RecordKind(
        ("instruction", "question", "query", "prompt", "input"),
        _question,
        "`system`, `system_prompt` or `system_message`, the turns of `history`, it, `input` or "
        "`context`, and one of `answer`, `completion`, `response`, `output`, `answers`, `target`, "
        "`chosen`, each on a line of its own; where one of them is messages, a conversation",
    ),
    RecordKind(("inputs_pretokenized",), _text, "running text (msModelSlim)"),
    RecordKind(("content",), _text, "running text"),
    RecordKind(
        ("input_ids",), _ids, "token ids, without those where `attention_mask` beside it is 0"
    ),
    RecordKind(("chosen",), _preferred, "running text, or a conversation: the better of two"),
)
RECORD_KEYS = tuple(key for kind in KINDS for key in kind.keys)
BESIDE = (
    *("context", *ANSWER_KEYS, "answers", "target", *SYSTEM_KEYS),
    *("history", "tools", "attention_mask"),
)
COLUMNS = (*RECORD_KEYS, *BESIDE)


def unused_keys(unused: Counter[str]) -> str | None:
    """A sentence about the keys that were not used; None where all were."""
    if not unused:
        return None
    ranked = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{key:.60} ({count:,})" for key, count in ranked[:MOST_SHOWN]]
    more = f" and {len(ranked) - MOST_SHOWN} more" if len(ranked) > MOST_SHOWN else ""
    return f"keys that are not used, and in how many records: {', '.join(shown)}{more}"
