"""JSON that parsers read in different ways is refused, each kind with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.files.strict_json import parse_json, read_json
from ms_quant.models.config import load_config

PAIR = "\\ud83d\\ude00"  # an escaped emoji: two surrogates that belong together


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe", "can't decode"),
        (b'{"a": NaN}', "NaN, expected a finite number"),
        (b'{"a": [-Infinity]}', "-Infinity, expected a finite number"),
        (b'{"a": 1e999}', "1e999, expected a finite number"),
        (b'{"a": -1e999}', "-1e999, expected a finite number"),
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice"),
        (b'[{"b": {"a": 1, "c": 2, "a": 3}}]', "the key 'a' appears twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\uDfff": 1}', "surrogates not allowed"),
        (b'["\\ud83d", "\\ude00"]', "surrogates not allowed"),
        (b"[" * 65 + b"]" * 65, "more than 64 levels of nesting"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels of nesting"),
        (b"[" * 200_000, "more than 64 levels of nesting"),
        (b"1" * 5000, "digits"),
    ],
)
def test_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(content)
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(MsQuantError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: not valid JSON (")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"1e30", 1e30),
        (b'{"a": {"a": [1, -2.5e-7, null, true]}}', {"a": {"a": [1, -2.5e-7, None, True]}}),
        (f'"{PAIR}"'.encode(), "\U0001f600"),
        (b'"\\\\ud800"', "\\ud800"),
        (b"1000000000000000019884624838656", 1000000000000000019884624838656),
    ],
)
def test_accepted(content: bytes, value: object) -> None:
    assert parse_json(content) == value


def test_sixty_four_levels_are_accepted() -> None:
    assert parse_json(b"[" * 64 + b"1" + b"]" * 64)


def test_a_directory_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(MsQuantError, match=r"config\.json: is a directory, expected a file"):
        load_config(tmp_path)
