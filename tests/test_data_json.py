"""JSON records one at a time: every way that a file holds them, cut anywhere, and hostile ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ms_quant.data import files as data_files
from ms_quant.data import json_records as data_json
from ms_quant.data.json_records import is_json, read_values
from ms_quant.errors import MsQuantError

KEYS = ("text", "messages")
NAN = pytest.approx(float("nan"), nan_ok=True)
MESSAGE = {"role": "user", "content": "a"}


def values(tmp_path: Path, content: str) -> list[Any]:
    path = tmp_path / "x.json"
    path.write_bytes(content.encode())
    return [found.value for found in read_values(path, KEYS)]


@pytest.mark.parametrize("read", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\r\n', [{"text": "a"}, {"text": "b"}]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', [{"text": "a"}, {"text": "b"}]),
        ('"a"\n"b\\u00e9"\n', ["a", "bé"]),
        ('[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ('[\n  "a",\n  "b"\n]\n', ["a", "b"]),
        ("[]", [[]]),
        ("[[1, 2], [3]]", [[1, 2], [3]]),
        ("[1, 23]\n[456]", [[1, 23], [456]]),
        (json.dumps([MESSAGE, MESSAGE]), [[MESSAGE, MESSAGE]]),
        (json.dumps([MESSAGE]) + "\n" + json.dumps([MESSAGE]), [[MESSAGE], [MESSAGE]]),
        ('{"data": ["a", "b"], "version": 1}', ["a", "b"]),
        ('{"features": [], "rows": [{"row_idx": 0, "row": {"text": "a"}}]}',
         [{"row_idx": 0, "row": {"text": "a"}}]),
        ('{"text": "a", "data": [1]}', [{"text": "a", "data": [1]}]),
        ('{"text": "a", "score": NaN}', [{"text": "a", "score": NAN}]),
    ],
)  # fmt: skip
def test_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: Any, read: int
) -> None:
    monkeypatch.setattr(data_files, "READ_CHARS", read)
    assert values(tmp_path, content) == expected


def test_where_records_are(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"text": "a"}\n\n{"text":\n "b"}\n"c"')
    found = list(read_values(path, KEYS))
    assert [v.where.rpartition(": ")[2] for v in found] == ["line 1", "line 3", "line 5"]
    assert [(v.start, v.length) for v in found] == [(0, 13), (15, 14), (30, 3)]
    path.write_text('[ "a","bc"]')
    found = list(read_values(path, KEYS))
    assert [v.where.rpartition(": ")[2] for v in found] == ["record 1", "record 2"]
    assert [(v.start, v.length) for v in found] == [(2, 3), (6, 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{', "line 2 is not valid JSON"),
        ('{"a": 1}\n {"b"\n 2}', r"line 2 .*\(Expecting ':' delimiter: line 3, character 2\)"),
        ('{"text": "a"}\n{"text": "b\n{"text": "c"}', "line 2 is not valid JSON"),
        ('{"text": "a"}\nplain', r"line 2 is not valid JSON \(Expecting value: character 1\)"),
        (
            '{"text": "a"}\n{"text": "b"},\n{"text": "c"}',
            r"line 2 is not valid JSON \(a comma between records, .*: character 14\)",
        ),
        ('{"text": "a"}\n{"text": "b",}', r"line 2 .*\(a comma before }: character 13\)"),
        ('{"a": ["b",\n]}', r"line 1 is .*\(a comma before \]: character 11\)"),
        ('["a",\n {"text": "b"},\n]', r"record 2 is the last, expected no comma .*\(line 2\)"),
        ('["a",\n {"text": b}]', r"record 2 .*\(Expecting value: line 2, character 11\)"),
        ("{'text': 'a'}", "line 1 is not valid JSON"),
        ('{"text": "a", "text": "b"}', "line 1 is not valid JSON .*'text' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "a number has too many digits"),
        ('["a", "b"', r"record 2 is not followed by , or \] but by the end of the file"),
        ('["a" "b"]', r"record 1 is not followed by , or \] but by '\"' \(line 1\)"),
        ('["a",]', "record 1 is the last, expected no comma"),
        ('["a"]\n["b"]', "line 2 goes on after the list, expected one list alone"),
        ('{"train": ["a"], "test": ["b"], "data": ["c"]}', "the lists data and train, expected"),
    ],
)
def test_refusals(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(MsQuantError, match=rf"x\.json: .*{message}"):
        values(tmp_path, content)


def test_a_long_list_inside_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_json, "MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr(data_files, "READ_CHARS", 100)
    rows = [{"text": "x" * 90} for _ in range(50)]
    for value in ({"version": [1], "data": rows, "end": {"a": 1}}, {"train": rows}):
        assert values(tmp_path, "\n " + json.dumps(value) + "\n") == rows
    row = json.dumps(rows)
    for content in (
        f'{{"data": {row}, "text": "a"}}',
        f'{{"data": {row}}}\n{{}}',
        f'{{"data": {row}, "rows": {row}}}',
        f'{{"other": {row}}}',
        f'{{"data": {row}',
        f"{{5: {row}}}",
    ):
        with pytest.raises(MsQuantError, match=r"is longer than 1000 characters|not valid JSON"):
            values(tmp_path, content)


@pytest.mark.parametrize("content", ['{"text": "%s"}', '["%s"]', '["a", "%s"]', '{"text": "%s'])
def test_a_record_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(data_json, "MAX_RECORD_CHARS", 1000)
    monkeypatch.setattr(data_files, "READ_CHARS", 100)
    with pytest.raises(MsQuantError, match="is longer than 1000 characters, expected smaller"):
        values(tmp_path, content % ("x" * 5000))


def test_a_wrong_value_does_not_make_it_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "READ_CHARS", 100)
    path = tmp_path / "x"
    path.write_text('{"text": oops' + " " * 10_000)
    reader = data_json.JsonReader(path)
    with pytest.raises(MsQuantError, match="not valid JSON"):
        reader.value("x")
    assert len(reader.text) == 100


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}', True),
        ('{"text": "a"}\nnot', True),  # an error, never running text
        ('\n [{"text": "a"}]', True),
        ('["a", oops', True),
        ("[[1, 2], [3]]", True),
        ("[1, 2]\n[3]", True),
        ("[" * 100_000, True),
        ('{"text": "cut o', True),
        ("{'text': 'a'}", True),  # as Python prints it
        ("['a', 'b']", True),
        ('{"a": 1, "a": 2}', True),
        ('"quoted" he said', False),
        ("[1] Smith et al.", False),
        ("[Music] Hello", False),
        ("[[Link]] in a wiki", False),
        ('["quoted" he said]', False),
        ("{}", False),
        ("{\\bf TeX}", False),
        ("{ int x; }", False),
        ("Text.", False),
        ("", False),
    ],
)
def test_json_under_another_name(tmp_path: Path, content: str, expected: bool) -> None:
    path = tmp_path / "x.txt"
    path.write_text(content)
    assert is_json(path) is expected
