"""Globs with brace sets over full linear paths."""

from __future__ import annotations

import pytest

from ms_quant.errors import MsQuantError
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
