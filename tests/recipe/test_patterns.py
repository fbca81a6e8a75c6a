"""Globs with brace sets over full linear paths."""

from __future__ import annotations

import re
import time

import pytest

from ms_quant.errors import MsQuantError
from ms_quant.recipe.bounded import ALL_SECONDS, SECONDS, BoundedPattern
from ms_quant.recipe.patterns import escape, matches, unmatched

Q, DOWN = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*", Q, True),
        ("*.q_proj", Q, True),
        ("q_proj", Q, False),  # the whole path, not a part of it
        ("*.Q_proj", Q, False),
        ("model.layers.?.self_attn.*", Q, True),
        ("*.{q,k,v}_proj", Q, True),
        ("*.{q,k,v}_proj", DOWN, False),
        ("*.{self_attn.{q,k},mlp.{up,down}}_proj", DOWN, True),
        ("*.{self_attn.{q,k},mlp.{up,down}}_proj", Q, True),
        ("model.layers.{0..3}.*", Q, True),
        ("model.layers.{0..2}.*", Q, False),
        ("model.layers.[0-4].*", Q, True),
        (r"re:.*\.layers\.\d\.mlp\.", DOWN, True),  # matched from the beginning, not to the end
        (r"re:layers", DOWN, False),
        ("!*", Q, False),  # no negation
    ],
)
def test_a_pattern_matches(pattern, path, expected):
    assert matches(path, [pattern]) is expected


def test_exclude_wins():
    assert matches(Q, ["*"], ["*.mlp.*"])
    assert not matches(DOWN, ["*"], ["*.mlp.*"])
    assert not matches(DOWN, ["*.down_proj"], ["*.down_proj"])
    assert not matches(Q, [])


def test_unmatched_patterns_in_their_order():
    patterns = ["*.o_proj", "*", "*.{o,q}_proj", "*.w2"]
    assert unmatched(patterns, [Q, DOWN]) == ["*.o_proj", "*.w2"]


def test_what_is_escaped_is_itself():
    odd = "a{b,c}*[d]?!e"
    assert matches(f"x{odd}y", [f"*{escape(odd)}*"])
    assert not matches("xaby", [f"*{escape(odd)}*"])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "0 characters"),
        ("*" * 1001, "1001 characters"),
        ("{1..1000000000}", "not usable"),
        ("{a,b}" * 30, "not usable"),
        ("re:(", "no regular expression"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern, words):
    with pytest.raises(MsQuantError, match=words):
        matches(Q, [pattern])


SLOW = [
    r"(\w+\.?)+!",
    r"(a|a|\w)*!",
    r"(.*)*(.*)*(.*)*!",
    r"^(([a-z_.0-9])+.)+[A-Z]([a-z])+$",
    r"(?:(?:[\w.]+)+)+\b!",
    r"(\w|\w\w|\w\w\w)+#",
]


@pytest.mark.parametrize("expression", SLOW)
def test_an_expression_that_takes_for_ever_is_refused(expression):
    path = "model.layers.3.self_attn.q_proj." * 4
    start = time.process_time()
    try:
        assert not matches(path, [f"re:{expression}"])
    except MsQuantError as error:
        assert f"takes more than {SECONDS:g} s" in str(error)
    assert time.process_time() - start < 5 * SECONDS


def test_an_expression_has_seconds_for_all_names():
    pattern = BoundedPattern(r"(?:\w+\.?)+!", "it")
    start = time.process_time()
    for count in range(10_000):
        try:
            assert not pattern.match(f"{'a' * 18}{count}")
        except MsQuantError:
            break
    assert time.process_time() - start < ALL_SECONDS + 2


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        (r"(((a{1000}){1000}){1000})", "counts to more than"),
        (r"a{99999999999999999999}", "counts to more than"),
        (r"(", "no regular expression"),
        (r"[[:alpha:]]", "expected letters"),
    ],
)
def test_an_expression_that_is_none_or_counts_too_far_is_refused(expression, words):
    with pytest.raises(MsQuantError, match=words):
        matches(Q, [f"re:{expression}"])


@pytest.mark.parametrize(
    "expression", [r"model\.{1}", r"[{]x", r"m{x}", r"model{", r".{0,5}l\.", r"a{,3}m"]
)
def test_braces_are_those_of_re(expression):
    assert matches(Q, [f"re:{expression}"]) is bool(re.match(expression, Q))
