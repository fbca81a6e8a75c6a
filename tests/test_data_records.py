"""Records as data sets spell them: what each becomes, and one sentence for each defect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ms_quant.data.records import Conversation, parse_record
from ms_quant.errors import MsQuantError

ASKED = {"role": "user", "content": "q"}
TOLD = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("a", "a"),
        ({"text": "a", "timestamp": "2020", "url": None}, "a"),
        ({"text": "a", "messages": [ASKED]}, "a"),
        ({"text": "", "content": "a"}, "a"),
        ({"text": None, "prompt": "q", "answer": "a"}, "q\na"),
        ({"prompt": "q"}, "q"),
        ({"prompt": "q", "answer": None}, "q"),
        ({"prompt": "q ", "completion": "a"}, "q a"),
        ({"prompt": "q", "response": "\na"}, "q\na"),
        ({"question": "q", "answer": "a"}, "q\na"),
        ({"query": "q", "response": "a"}, "q\na"),
        ({"instruction": "i", "input": "", "output": "a"}, "i\na"),
        ({"instruction": "i", "input": "c", "output": "a"}, "i\nc\na"),
        ({"instruction": "i", "context": "c", "response": "a", "category": "x"}, "i\nc\na"),
        ({"input": "q", "output": "a"}, "q\na"),
        ({"inputs_pretokenized": "a", "id": 7}, "a"),
        ({"content": "a"}, "a"),
        ({"row_idx": 3, "row": {"text": "a"}, "truncated_cells": []}, "a"),
    ],
)
def test_texts(record: Any, expected: str) -> None:
    assert parse_record(record, "x: line 1") == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASKED, TOLD]}, [ASKED, TOLD]),
        ({"prompt": "other", "prompt_id": "x", "messages": [ASKED, TOLD]}, [ASKED, TOLD]),
        ({"conversations": [ASKED, TOLD]}, [ASKED, TOLD]),
        ({"conversation": [ASKED]}, [ASKED]),
        ([ASKED, TOLD], [ASKED, TOLD]),
        ({"prompt": [ASKED], "completion": [TOLD]}, [ASKED, TOLD]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [ASKED, TOLD],
        ),
        (
            {"conversations": [{"from": "Human", "value": "q", "role": None}], "system": "s"},
            [{"role": "system", "content": "s"}, ASKED],
        ),
        (
            {"messages": [{"role": "system", "content": "t"}, ASKED], "system": "s"},
            [{"role": "system", "content": "t"}, ASKED],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TOLD]},
            [ASKED, TOLD],
        ),
        (
            {"messages": [{"role": "user", "content": ["q", {"type": "text", "text": "r"}]}]},
            [{"role": "user", "content": "q\nr"}],
        ),
        (  # null without a call is nothing; with one it stays, as templates ask for it
            {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": []}]},
            [ASKED, {"role": "assistant", "content": "", "tool_calls": []}],
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}]},
            [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        ),
        (  # arguments as a text, as clients of servers send them
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
                        ],
                    }
                ]
            },
            [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        ),
        (
            {"messages": [{**TOLD, "reasoning_content": "r", "name": None}]},
            [{**TOLD, "reasoning_content": "r"}],
        ),
    ],
)
def test_conversations(record: Any, expected: Any) -> None:
    assert parse_record(record, "x: line 1") == Conversation(expected)


@pytest.mark.parametrize("tools", [[CALL], '[{"type": "function", "function": {"name": "f"}}]'])
def test_tools_beside_a_conversation(tools: Any) -> None:
    found = parse_record({"messages": [ASKED], "tools": tools}, "x")
    assert isinstance(found, Conversation) and found.tools is not None
    assert found.tools[0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_ids": [1, 2]}, [1, 2]),
        ({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, [1, 2]),
        ([3, 4], [3, 4]),
    ],
)
def test_ids(record: Any, expected: list[int]) -> None:
    found = parse_record(record, "x")
    assert isinstance(found, np.ndarray) and found.tolist() == expected


@pytest.mark.parametrize(
    "record", ["", " \n", [], {"text": ""}, {"text": None}, {"messages": []}, {"prompt": " "}]
)
def test_nothing(record: Any) -> None:
    assert parse_record(record, "x") is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "is a JSON number, expected an object or a string"),
        (None, "is a JSON null, expected an object or a string"),
        (["a"], "is a list of JSON string, expected"),
        ({"foo": "a", "bar": 1}, r"has the keys \['bar', 'foo'\], expected one of text, messages"),
        ({}, r"has the keys \[\], expected one of text"),
        ({"answer": "a"}, r"has the keys \['answer'\]"),
        ({"rejected": "b"}, "has the keys"),
        ({"text": 3}, "text is a JSON number, expected a string"),
        ({"text": ["a"]}, "text is a JSON list, expected a string"),
        ({"text": {"0": "a"}}, "text is a JSON object, expected a string"),
        ({"prompt": "a", "answer": 3}, "answer is a JSON number, expected a string"),
        ({"prompt": "a", "answer": "b", "response": "c"}, "has answer and response, expected one"),
        ({"role": "user", "content": "a"}, r'a single message, expected .*"messages"'),
        ({"messages": "a"}, "messages is a JSON string, expected a list of messages"),
        ({"messages": ["a"]}, r"messages\[0\] is a JSON string, expected a message"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, r"the keys \['assistant', 'human'"),
        ({"messages": [ASKED, {"role": "user"}]}, r"messages\[1\] has no content"),
        ({"messages": [{"role": 3, "content": "a"}]}, "role is a JSON number"),
        ({"messages": [{"role": "user", "content": 3}]}, "content is a JSON number"),
        ({"messages": [{"content": "a"}]}, r"\['content'\], expected role and content, or from"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"messages\[0\]\.content\[0\] is 'image_url', expected text alone: images are not read",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            r"conversations\[0\]: from is 'narrator', expected one of system, human",
        ),
        ({"conversations": [{"from": "human", "value": None}]}, "value is a JSON null"),
        ({"messages": [ASKED], "tools": "{"}, "tools: '{' is not a JSON list"),
        ({"messages": [ASKED], "tools": {"a": 1}}, "tools is a JSON object, expected a list"),
        (
            {"messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "x"}}]}]},
            "arguments of a tool call: 'x' is not a JSON dict",
        ),
        ({"input_ids": [1.5]}, "input_ids, expected a list of whole numbers"),
        ({"input_ids": [True]}, "input_ids, expected a list of whole numbers"),
        ({"input_ids": [[1]]}, "input_ids, expected a list of whole numbers"),
        ({"input_ids": [1 << 70]}, "input_ids holds a number beyond 64 bits"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask, expected 2 of 0 or 1"),
    ],
)
def test_refusals(record: Any, message: str) -> None:
    with pytest.raises(MsQuantError, match=rf"^x: line 1.*{message}"):
        parse_record(record, "x: line 1")
