"""YAML that is hostile, or means two things."""

from __future__ import annotations

import time

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.recipe import load_recipe
from ms_quant.recipe.yaml_file import MAX_BYTES, parse_yaml, read_yaml


def layers(one: str, fan: int) -> bytes:
    """Aliases of aliases, 20 deep."""
    text = "a0: &a0 {x: 1}\n"
    for i in range(1, 20):
        text += f"a{i}: &a{i} {one % ', '.join([f'*a{i - 1}'] * fan)}\n"
    return text.encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: !!python/object/apply:os.system [ls]", "line 1: could not determine a constructor"),
        (b"a: !!python/name:os.system", "could not determine a constructor"),
        (b"a: 1\nb: 2\na: 3", "line 3: the key 'a' appears twice"),
        (b"a: {b: {c: 1, c: 1}}", "the key 'c' appears twice"),
        (b"a: .nan", "nan, expected a finite number"),
        (b"a: -.inf", "expected a finite number"),
        (b"a: 1e999", "expected a finite number"),
        (b"[" * 100_000, "more than 64 levels|maximum nesting depth"),
        (b"- " * 70 + b"x", "more than 64 levels|maximum nesting depth"),
        (b"&a [*a]", "holds itself"),
        (layers("[%s]", 9), "more than 100000 values"),
        (layers("{<<: [%s]}", 9), "more than 100000 values"),
        (b"a: \xff", "utf-8"),
        (b"a: \x00", "control characters"),
        (b"a: [", "line 2"),
        (b"a: 1\n---\nb: 2", "line 2: but found another document"),
        (b"a: *b", "undefined alias"),
        (b"? [a]\n: 1", "unhashable key"),
        (b"a: " + b"9" * 5000, "too large for an integer"),
        (b"a: 2024-99-99", "no timestamp"),
        (b"a: !!timestamp x", "no timestamp"),
        (b"a: !!bool x", "no bool"),
    ],
)
def test_refused(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(MsQuantError, match=words) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "nothing"), (b"- a", "a list"), (b"a", "str")]
)
def test_what_is_no_mapping_is_refused(tmp_path, content, found):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(MsQuantError, match=f"found .*{found}.*, expected a mapping"):
        load_recipe(path)


def test_large_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(MsQuantError, match="no such file"):
        load_recipe(path)
    with pytest.raises(MsQuantError, match="is a directory"):
        load_recipe(tmp_path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(MsQuantError, match="larger than 1048576 bytes"):
        load_recipe(path)


def test_anchors_and_merges_are_read():
    content = b"a: &x {b: 1, c: 2}\nd: *x\ne: {<<: *x, b: 3}\n"
    plain = {"b": 1, "c": 2}
    assert parse_yaml(content) == {"a": plain, "d": plain, "e": {"b": 3, "c": 2}}


def test_exponents_without_a_point_are_numbers():
    assert parse_yaml(b"[1e-5, 2E3, 1e-5x, '1e-5']") == [1e-5, 2e3, "1e-5x", "1e-5"]


def test_a_byte_order_mark_is_no_part_of_a_key():
    assert parse_yaml("\ufeffa: 1".encode()) == {"a": 1}


def test_numbers_are_to_the_base_ten():
    assert parse_yaml(b"[1:30, 12:30:45.5, 0x1f, -7, 1_000]") == [
        "1:30",
        "12:30:45.5",
        31,
        -7,
        1000,
    ]


@pytest.mark.parametrize("content", [b"a: 9223372036854775808", b"a: " + b"9" * 5000, b"a: 1e999"])
def test_numbers_that_are_too_large_are_refused(content):
    with pytest.raises(ValueError, match=r"too large|finite number"):
        parse_yaml(content)


@pytest.mark.parametrize(
    "content",
    [
        b"- 1\n" * (MAX_BYTES // 4),
        b"[" + b"1," * (MAX_BYTES // 2 - 2) + b"]",
        b"a: &a [" + b"1," * 50_000 + b"]\nb: [*a, *a, *a]\n",
        b"{" + b"a: ,b: ," * (MAX_BYTES // 8 - 2) + b"}",
    ],
    ids=["lines", "list", "aliases", "keys"],
)
def test_a_large_file_is_refused_within_seconds(content):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"more than 100000 values|twice"):
        parse_yaml(content)
    assert time.process_time() - start < 10
