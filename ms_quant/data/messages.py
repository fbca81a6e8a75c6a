"""Messages of a conversation, however they are spelled, as a chat template takes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ms_quant.data.json_records import is_message
from ms_quant.errors import BadFileError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
SPEAKERS = {
    "system": SYSTEM,
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "assistant": ASSISTANT,
    "function_call": ASSISTANT,
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "developer": SYSTEM,
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: each with ``role`` and ``content``, and whatever else the record has.
        tools: what the assistant may call, or None.
    """

    messages: list[Message]
    tools: list[Any] | None = None


def are_messages(value: Any) -> bool:
    """Whether a value is a list that begins with a message."""
    return isinstance(value, list) and bool(value) and is_message(value[0])


def read_messages(value: Any, where: str, unused: set[str]) -> list[Message]:
    """Messages of either spelling: role and content, or from and value.

    Args:
        value (Any): a list of them, or lists of what each of them has under a key.
        where (str): names the value in errors; its last word is its key.
        unused (set): gets the keys of messages that are not used.

    Raises:
        MsQuantError: it is no such list, or one of them is no message.
    """
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise BadFileError(f"{where} is a JSON {json_type(value)}, expected a list of messages")
    key = where.rpartition(" ")[2]
    return [_message(m, f"{where}[{i}]", f"{key}[].", unused) for i, m in enumerate(value)]


def _message(value: Any, where: str, prefix: str, unused: set[str]) -> Message:
    if not isinstance(value, dict):
        raise BadFileError(f"{where} is a JSON {json_type(value)}, expected a message")
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
        said = read_string(value["value"], "value", where)
        others = value.keys() - {"role", "from", "value"}
        unused |= {f"{prefix}{key}" for key in others if not is_empty(value[key])}
        return {"role": SPEAKERS[speaker.lower()], "content": said}
    role = read_string(value["role"], "role", where)
    read = {k: v for k, v in value.items() if v is not None}
    calls = value.get("tool_calls") or value.get("function_call")
    if value.get("function_call") and not value.get("tool_calls"):  # as OpenAI had it before tools
        read["tool_calls"] = [{"type": "function", "function": read.pop("function_call")}]
    if isinstance(read.get("tool_calls"), list):
        read["tool_calls"] = [_call(call, where) for call in read["tool_calls"]]
    if "content" not in value and not calls:
        raise BadFileError(f"{where} has no content, expected a string")
    content: Any = value.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is not None:
        content = read_string(content, "content", where)
    elif not calls:
        content = ""
    return {**read, "role": SPEAKERS.get(role.lower(), role), "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else json_type(part)
    raise BadFileError(f"{where} is {kind!r:.40}, expected text alone: images are not read")


def _call(call: Any, where: str) -> Any:
    """A call of a tool, its arguments as an object, as servers give them to templates."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = _parse(function["arguments"] or "{}", f"{where}: arguments of a tool call", dict)
    return {**call, "function": {**function, "arguments": arguments}}


def read_tools(value: Any, where: str) -> list[Any] | None:
    """What the assistant may call: a list, or its JSON.

    Raises:
        MsQuantError: it is neither.
    """
    if is_empty(value):
        return None
    if isinstance(value, str):
        value = _parse(value, f"{where}: tools", list)
    if not isinstance(value, list):
        raise BadFileError(f"{where}: tools is a JSON {json_type(value)}, expected a list")
    return value or None


def _parse(text: str, where: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise BadFileError(f"{where}: {text!r:.60} is not a JSON {kind.__name__}")
    return value


def read_string(value: Any, key: str, where: str) -> str:
    """A text.

    Raises:
        MsQuantError: it is none.
    """
    if not isinstance(value, str):
        raise BadFileError(f"{where}: {key} is a JSON {json_type(value)}, expected a string")
    return value


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing to read."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, dict):  # lists by their key, as Parquet has them
        return all(item == [] for item in value.values())
    return value is None or value == [] or value != value


def json_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {"dict": "object", "str": "string", "bool": "boolean", "NoneType": "null"}
    name = type(value).__name__
    return "number" if name in ("int", "float") else names.get(name, name)
