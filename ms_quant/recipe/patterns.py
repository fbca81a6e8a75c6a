"""Patterns of linears: shell globs with brace sets over full paths.

``*`` matches dots, too: ``*.{q,k}_proj`` and ``model.layers.{0..3}.*`` name linears such as
``model.layers.0.self_attn.q_proj``. Layers that predict further tokens are reached by their
number or by ``mtp.*`` alone. A pattern that begins with ``re:`` is a regular expression,
matched from the beginning of a path; glob characters have no meaning in it. None may take long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from wcmatch import fnmatch
from wcmatch.fnmatch import escape

from ms_quant.errors import BadArgumentError
from ms_quant.models.names import block_prefix, in_block
from ms_quant.recipe.bounded import BoundedPattern

__all__ = [
    "FURTHER",
    "REGEX",
    "check_pattern",
    "escape",
    "further_names",
    "matches",
    "matches_further",
    "unmatched",
]

REGEX = "re:"
FURTHER = "mtp."
NO_LAYER = 999_999_999
LONGEST = 1000
MOST_ALTERNATIVES = 1000
_FLAGS = fnmatch.BRACE | fnmatch.CASE | fnmatch.FORCEUNIX | fnmatch.DOTMATCH


def matches(path: str, include: Iterable[str], exclude: Iterable[str] = ()) -> bool:
    """Whether some pattern includes a path and none excludes it.

    Raises:
        MsQuantError: as :func:`check_pattern`.
    """
    return _any(path, include) and not _any(path, exclude)


def matches_further(path: str, include: Iterable[str], exclude: Iterable[str] = ()) -> bool:
    """The same of a linear in a layer that predicts further tokens.

    A pattern includes it only if it names the layer, and would not match the same linear of any
    other, or begins with ``mtp.``: ``mtp.*``, ``mtp.mlp.experts.*``, ``model.layers.61.*``.

    Raises:
        MsQuantError: as :func:`check_pattern`.
    """
    block, name = further_names(path)
    if not any(_any(name if p.startswith(FURTHER) else path, [p]) for p in exclude):
        return any(
            _any(name, [p]) if p.startswith(FURTHER) else _any(path, [p]) and not _any(block, [p])
            for p in include
        )
    return False


def further_names(path: str) -> tuple[str, str]:
    """The path that a linear would have in a layer that no model has, and that behind ``mtp.``."""
    found = in_block(path)
    assert found is not None, path
    return f"{block_prefix(NO_LAYER)}{found[1]}", f"{FURTHER}{found[1]}"


def unmatched(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The patterns that match none of the paths, in their order.

    Raises:
        MsQuantError: as :func:`check_pattern`.
    """
    return [pattern for pattern in patterns if not any(map(_matcher(pattern), paths))]


def check_pattern(pattern: str) -> None:
    """Refuses what is no pattern.

    Raises:
        MsQuantError: it is empty, longer than 1,000 characters, a regular expression that does not
            compile, or has brace sets of more than 1,000 alternatives.
    """
    _matcher(pattern)


def _any(path: str, patterns: Iterable[str]) -> bool:
    return any(_matcher(pattern)(path) for pattern in patterns)


@lru_cache(maxsize=4096)
def _matcher(pattern: str) -> Callable[[str], bool]:
    if not 0 < len(pattern) <= LONGEST:
        raise BadArgumentError(
            f"pattern {pattern!r:.80} has {len(pattern)} characters, expected 1 to {LONGEST}"
        )
    if pattern.startswith(REGEX):
        return _regex(pattern)
    try:
        globs = fnmatch.translate(pattern, flags=_FLAGS, limit=MOST_ALTERNATIVES)[0]
        compiled = [BoundedPattern(glob, f"pattern {pattern!r:.80}") for glob in globs]
    except Exception as error:  # its limit error is no public name
        raise BadArgumentError(
            f"pattern {pattern!r:.80} is not usable ({error}), expected a glob such as "
            "'*.down_proj' or 'model.layers.{0..3}.*'"
        ) from None
    return lambda path: any(glob.match(path, whole=True) for glob in compiled)


def _regex(pattern: str) -> Callable[[str], bool]:
    return BoundedPattern(pattern.removeprefix(REGEX), f"pattern {pattern!r:.80}").match
