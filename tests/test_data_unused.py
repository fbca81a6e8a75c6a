"""What records hold is read, or named with the number of records: nothing is dropped silently."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ms_quant.data.calibration import eval_windows, load_tokens
from ms_quant.data.json_records import read_values
from ms_quant.data.messages import Conversation
from ms_quant.data.records import RECORD_KEYS, parse_record, unused_keys
from ms_quant.errors import MsQuantError

USER = {"role": "user", "content": "q"}
TOLD = {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
EARLIER = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(directory / "tokenizer.json"))
    return directory


def turn(speaker: str, value: str, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


def read(record: Any) -> tuple[Any, list[str]]:
    unused: Counter[str] = Counter()
    content = parse_record(record, "x: line 1", unused)
    assert set(unused.values()) <= {1}
    return (content.messages if isinstance(content, Conversation) else content), sorted(unused)


@pytest.mark.parametrize(
    ("record", "expected", "unused"),
    [
        # Wikipedia, C4, OASST rows
        ({"id": "1", "url": "u", "title": "t", "text": "a"}, "a", ["id", "title", "url"]),
        ({"text": "a", "meta": {}, "tags": [], "note": " ", "x": float("nan")}, "a", []),
        ({"text": "a", "role": "prompter", "rank": 0}, "a", ["rank", "role"]),
        # Alpaca, with the whole prompt beside it
        ({"text": "a", "instruction": "i", "output": "o"}, "a", ["instruction", "output"]),
        # preferences
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q\na", ["rejected"]),
        ({"prompt": "q", "chosen": "q a", "rejected": "q b"}, "q a", ["rejected"]),
        ({"chosen": "q a", "rejected": "q b"}, "q a", ["rejected"]),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "s\nq\na", ["rejected"]),
        ({"prompt": "q", "response": "a", "chosen": "c"}, "q\na", ["chosen"]),
        # SQuAD, TriviaQA, NQ, ELI5
        (
            {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [4]}},
            "q\nc\na",
            ["answers.answer_start"],
        ),
        ({"question": "q", "answers": {"text": ["a", "a"], "answer_start": []}}, "q\na", []),
        ({"question": "q", "answers": {"text": [], "answer_start": []}}, "q", []),
        ({"question": "q", "answers": {"text": ["a", "b"]}}, "q\na", ["answers.text[1:]"]),
        ({"question": "q", "answer": {"value": "a", "aliases": ["b"]}}, "q\na", ["answer.aliases"]),
        ({"question": "q", "answer": ["a", "b"]}, "q\na", ["answer[1:]"]),
        ({"question": "q", "answers": [{"text": "a", "score": 2}]}, "q\na", ["answers.score"]),
        ({"question": "q", "answers": [3]}, "q", ["answers"]),
        ({"question": "q", "context": ["c", "d"], "answer": "a"}, "q\nc\nd\na", []),
        ({"kind": "NLI", "input": "q", "target": "a"}, "q\na", ["kind"]),  # Firefly
        (  # of the hub's viewer, which cuts long texts
            {"row_idx": 1, "row": {"text": "a"}, "truncated_cells": ["text"]},
            "a",
            ["truncated_cells beside row"],
        ),
        # C-Eval
        ({"question": "q", "A": "1", "B": "2", "answer": "A"}, "q\nA", ["A", "B"]),
        # ModelScope, LLaMA-Factory, OpenOrca
        ({"query": "q", "response": "a", "history": [["h", "i"]]}, "h\ni\nq\na", []),
        ({"instruction": "q", "output": "a", "history": [["h", None]]}, "h\nq\na", []),
        ({"query": "q", "response": "a", "history": []}, "q\na", []),
        ({"query": "q", "response": "a", "history": "h"}, "q\na", ["history"]),
        ({"query": "q", "response": "a", "history": [3]}, "q\na", ["history"]),
        ({"system_prompt": "s", "question": "q", "response": "a", "id": 1}, "s\nq\na", ["id"]),
        ({"system_message": "s", "prompt": "q"}, "s\nq", []),
        ({"instruction": "i", "question": "q", "answer": "a"}, "i\na", ["question"]),
        # as conversations
        (
            {"prompt": "q", "chosen": [USER, TOLD], "rejected": [USER, WORSE]},
            [USER, TOLD],
            ["rejected"],
        ),
        ({"prompt": [USER], "chosen": [TOLD], "rejected": [WORSE]}, [USER, TOLD], ["rejected"]),
        ({"chosen": [USER, TOLD], "rejected": [USER, WORSE]}, [USER, TOLD], ["rejected"]),
        (
            {
                "conversations": [turn("human", "q")],
                "chosen": turn("gpt", "a"),
                "rejected": turn("gpt", "b"),
            },
            [USER, TOLD],
            ["rejected"],
        ),
        ({"messages": [USER, TOLD], "chosen": [USER, TOLD]}, [USER, TOLD], ["chosen"]),
        ({"prompt": [USER], "completion": "a"}, [USER, TOLD], []),
        ({"prompt": [USER], "context": "c"}, [USER], ["context"]),
        ({"query": "q", "response": "a", "history": EARLIER}, [*EARLIER, USER, TOLD], []),
        ({"prompt": [USER], "history": [["h", "i"]]}, [*EARLIER, USER], []),
        ({"messages": [USER], "system_prompt": "s"}, [SYSTEM, USER], []),
        ({"messages": [SYSTEM, USER], "system": "t"}, [SYSTEM, USER], ["system"]),
        (
            {"conversations": [turn("human", "q", weight=None), turn("gpt", "a", weight=1)]},
            [USER, TOLD],
            ["conversations[].weight"],
        ),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, [USER, TOLD], []),
        ({"prompt": "q", "prompt_id": "x", "messages": [USER]}, [USER], ["prompt", "prompt_id"]),
    ],
)
def test_what_is_read_and_what_is_named(record: Any, expected: Any, unused: list[str]) -> None:
    assert read(record) == (expected, unused)


def test_unused_keys_beside_token_ids() -> None:
    content, unused = read({"input_ids": [1, 2], "attention_mask": [1, 0], "labels": [1, 2]})
    assert (content.tolist(), unused) == ([1], ["labels"])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "s"}, SYSTEM),
        ({"role": "Human", "content": "q"}, USER),
        (
            {"role": "function", "name": "f", "content": "1"},
            {"role": "tool", "name": "f", "content": "1"},
        ),
        ({"role": "critic", "content": "x"}, {"role": "critic", "content": "x"}),
        (
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "f", "arguments": '{"x": 1}'},
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
                ],
            },
        ),
    ],
)
def test_spellings_that_templates_pass_over(message: Any, expected: Any) -> None:
    """Templates skip roles and keys that they do not know without an error."""
    assert read({"messages": [message]}) == ([expected], [])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": {"a": "b"}}, "answer is a JSON object, expected a string"),
        ({"question": "q", "answer": 2, "choices": ["a"]}, "answer is a JSON number, expected"),
        ({"question": "q", "system": {"a": 1}}, "system is a JSON object, expected a string"),
        ({"question": "q", "answer": "a", "output": "b"}, "has answer and output, expected one"),
        ({"prompt": [USER], "completion": [3]}, "completion is a JSON list, expected a string"),
    ],
)
def test_refusals(record: Any, message: str) -> None:
    with pytest.raises(MsQuantError, match=rf"^x: line 1: {message}|^x: line 1 {message}"):
        parse_record(record, "x: line 1")


def test_records_are_counted(tmp_path: Path, model: Path) -> None:
    path, notes = tmp_path / "x.jsonl", []
    records = [
        {"text": f"w1 w{i % 7} w2", "id": i, **({"url": "u"} if i % 2 else {})} for i in range(1200)
    ]
    path.write_text("\r\n\n".join(map(json.dumps, records)))
    said = f"{path}: keys that are not used, and in how many records: id (1,200), url (600)"
    load_tokens(path, model, 2, 4, 0, notes.append)
    eval_windows(path, model, 4, note=notes.append)
    assert notes == [said, said]
    path.write_text(json.dumps({"version": "1", "data": [{"text": "w1 w2"}], "tags": []}))
    load_tokens(path, model, 1, 2, 0, notes.append)
    assert notes[2].endswith(": version beside the list (1)")
    path.write_text('{"text": "w1 w2"}')
    load_tokens(path, model, 1, 2, 0, notes.append)
    assert len(notes) == 3


def test_keys_of_messages_that_the_template_passes_over(tmp_path: Path, model: Path) -> None:
    """Templates skip what they do not know without an error."""
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %} {{ m.content }} {{ m.reasoning_content }}{% endfor %}"
    )
    path, notes = tmp_path / "x.jsonl", list[str]()
    told = {
        "role": "assistant",
        "content": "w2",
        "reasoning_content": "w3",
        "loss": True,
        "reasoning": "w4",
        "tool_calls": [],
    }
    user = {"role": "user", "content": "w1"}
    path.write_text(json.dumps({"messages": [user, told], "tools": [{"name": "f"}]}))
    load_tokens(path, model, 1, 3, 0, notes.append)
    assert notes[0].endswith("records: messages[].loss (1), messages[].reasoning (1), tools (1)")
    (model / "chat_template.jinja").unlink()


def test_columns_that_are_not_read_are_named(tmp_path: Path, model: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    answers = [{"text": ["w3"], "answer_start": [4]}] * 2
    columns = {"question": ["w1", "w2"], "answers": answers, "id": [1, 2], "title": ["a", "b"]}
    path, notes = tmp_path / "x.parquet", list[str]()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    windows = eval_windows(path, model, 4, note=notes.append)
    assert windows.tolist() == [[1, 3, 2, 3]]
    assert notes[0].endswith("records: answers.answer_start (2), id (2), title (2)")


def test_many_keys_are_cut_short() -> None:
    assert unused_keys(Counter()) is None
    said = unused_keys(Counter({f"k{i}": 100 - i for i in range(11)}))
    assert said is not None and said.endswith("k7 (93) and 3 more")


def test_a_long_list_beside_which_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ms_quant.data.json_records.MAX_RECORD_CHARS", 1000)
    path, unused = tmp_path / "x.json", Counter[str]()
    path.write_text(json.dumps({"name": "n", "data": [{"text": "x" * 90}] * 50, "empty": []}))
    assert len(list(read_values(path, RECORD_KEYS, unused))) == 50
    assert unused == {"name beside the list": 1}
