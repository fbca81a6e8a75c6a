"""A record of data, however its keys are called, becomes a text, a conversation or token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_quant.data.json_records import is_message
from ms_quant.errors import BadFileError

CONTEXT_KEYS = ("input", "context")
ANSWER_KEYS = ("answer", "completion", "response", "output")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: each with ``role`` and ``content``, and whatever else the record has.
        tools: what the assistant may call, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


Content = str | Conversation | np.ndarray
Record = dict[str, Any]


def parse_record(value: Any, where: str) -> Content | None:
    """What a record holds.

    Args:
        value (Any): the record, from JSON or Parquet.
        where (str): names it in errors.

    Returns:
        str, Conversation, or int64 ids of one dimension. None if it is empty.

    Raises:
        MsQuantError: it has none of the known keys, or what one holds is of the wrong type.
    """
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, list):
        return _parse_list(value, where)
    if not isinstance(value, dict):
        raise BadFileError(f"{where} is a JSON {_named(value)}, expected an object or a string")
    if "row_idx" in value and isinstance(value.get("row"), dict):
        value = value["row"]
    known = [kind for kind in KINDS for key in kind.keys if key in value]
    if not known:
        raise BadFileError(
            f"{where} has the keys {sorted(map(str, value))!r:.80}, expected one of "
            f"{', '.join(RECORD_KEYS)}"
        )
    for kind in known:
        for key in kind.keys:
            if not _is_empty(value.get(key)):
                return kind.read(value, key, where)
    return None


def _parse_list(value: list[Any], where: str) -> Content | None:
    if all(type(item) is int for item in value):
        return _ids({"ids": value}, "ids", where) if value else None
    if is_message(value[0]):
        return _conversation({"messages": value}, "messages", where)
    raise BadFileError(
        f"{where} is a list of JSON {_named(value[0])}, expected an object, a string, a list of "
        "messages or of token ids"
    )


def _text(record: Record, key: str, where: str) -> str:
    if is_message(record):
        raise BadFileError(
            f'{where} is a single message, expected a conversation: {{"messages": [...]}}'
        )
    return _string(record[key], key, where)


def _question(record: Record, key: str, where: str) -> Content:
    """A question with its context and answer, or messages in their place."""
    beside = [k for k in (*CONTEXT_KEYS, *ANSWER_KEYS) if k != key]
    given = [k for k in beside if not _is_empty(record.get(k))]
    answers = [k for k in given if k in ANSWER_KEYS]
    if len(answers) > 1:
        raise BadFileError(f"{where} has {' and '.join(answers)}, expected one answer to {key}")
    if isinstance(record[key], list):
        later = [record[k] for k in answers if isinstance(record[k], list)]
        return _conversation({**record, key: sum(later, record[key])}, key, where)
    return _join([_string(record[k], k, where) for k in (key, *given)])


def _conversation(record: Record, key: str, where: str) -> Conversation:
    messages = record[key]
    if not isinstance(messages, list):
        raise BadFileError(
            f"{where}: {key} is a JSON {_named(messages)}, expected a list of messages"
        )
    read = [_message(m, f"{where}: {key}[{i}]") for i, m in enumerate(messages)]
    system = record.get("system")
    if not _is_empty(system) and read[0]["role"] != "system":
        read.insert(0, {"role": "system", "content": _string(system, "system", where)})
    return Conversation(read, _tools(record.get("tools"), where))


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message of either spelling: role and content, or from and value."""
    if not isinstance(value, dict):
        raise BadFileError(f"{where} is a JSON {_named(value)}, expected a message")
    if "role" not in value and not {"from", "value"} <= value.keys():
        raise BadFileError(
            f"{where} has the keys {sorted(value)!r:.80}, expected role and content, or from and "
            "value"
        )
    if value.get("role") is None and "from" in value:
        speaker = value["from"]
        if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
            raise BadFileError(
                f"{where}: from is {speaker!r:.40}, expected one of {', '.join(SPEAKERS)}"
            )
        said = _string(value["value"], "value", where)
        return {"role": SPEAKERS[speaker.lower()], "content": said}
    calls = value.get("tool_calls") or value.get("function_call")
    if "content" not in value and not calls:
        raise BadFileError(f"{where} has no content, expected a string")
    content: Any = value.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is not None:
        content = _string(content, "content", where)
    elif not calls:
        content = ""
    role = _string(value["role"], "role", where)
    read = {k: v for k, v in value.items() if v is not None}
    if isinstance(value.get("tool_calls"), list):
        read["tool_calls"] = [_call(call, where) for call in value["tool_calls"]]
    return {**read, "role": role, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else _named(part)
    raise BadFileError(f"{where} is {kind!r:.40}, expected text alone: images are not read")


def _call(call: Any, where: str) -> Any:
    """A call of a tool, its arguments as an object, as servers give them to templates."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _parse(function["arguments"] or "{}", f"{where}: arguments of a tool call", dict)
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(value: Any, where: str) -> list[Any] | None:
    if _is_empty(value):
        return None
    if isinstance(value, str):
        value = _parse(value, f"{where}: tools", list)
    if not isinstance(value, list):
        raise BadFileError(f"{where}: tools is a JSON {_named(value)}, expected a list")
    return value or None


def _parse(text: str, where: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise BadFileError(f"{where}: {text!r:.60} is not a JSON {kind.__name__}")
    return value


def _ids(record: Record, key: str, where: str) -> np.ndarray:
    """Token ids, without those that the attention mask leaves out."""
    ids, mask = record[key], record.get("attention_mask")
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


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadFileError(f"{where}: {key} is a JSON {_named(value)}, expected a string")
    return value


def _join(texts: list[str]) -> str:
    """Texts touch where one of them brings white space, else each is on a new line."""
    joined = ""
    for text in texts:
        apart = not joined or joined[-1:].isspace() or text[:1].isspace()
        joined += text if apart else f"\n{text}"
    return joined


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _named(value: Any) -> str:
    names = {"dict": "object", "str": "string", "bool": "boolean", "NoneType": "null"}
    name = type(value).__name__
    return "number" if name in ("int", "float") else names.get(name, name)


@dataclass(frozen=True)
class RecordKind:
    """A row of the table of records; of several in one record the first with a value counts.

    Attributes:
        keys: any of them makes a record of this kind.
        read: what the record holds, given it, the key and where it is.
        becomes: in the documentation, what is made of it.
    """

    keys: tuple[str, ...]
    read: Callable[[Record, str, str], Content]
    becomes: str


KINDS = (
    RecordKind(("text",), _text, "running text"),
    RecordKind(
        ("messages", "conversations", "conversation"),
        _conversation,
        "a conversation of `role` and `content`, or `from` and `value`, through the chat template; "
        "with `system` and `tools` beside it",
    ),
    RecordKind(
        ("instruction", "question", "query", "prompt", "input"),
        _question,
        "it, then `input` or `context`, then one of `answer`, `completion`, `response`, `output`, "
        "each on a line of its own; lists of messages are a conversation",
    ),
    RecordKind(("inputs_pretokenized",), _text, "running text (msModelSlim)"),
    RecordKind(("content",), _text, "running text"),
    RecordKind(
        ("input_ids",), _ids, "token ids, without those where `attention_mask` beside it is 0"
    ),
)
RECORD_KEYS = tuple(key for kind in KINDS for key in kind.keys)
BESIDE = ("context", *ANSWER_KEYS, "system", "tools", "attention_mask")
COLUMNS = (*RECORD_KEYS, *BESIDE)
