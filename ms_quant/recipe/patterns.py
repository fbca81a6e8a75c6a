"""Patterns of linears: shell globs with brace sets over full paths.

``*`` matches dots, too: ``*.{q,k}_proj`` and ``model.layers.{0..3}.*`` name linears such as
``model.layers.0.self_attn.q_proj``. A pattern that begins with ``re:`` is a regular expression,
matched from the beginning of a path; glob characters have no meaning in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from wcmatch import fnmatch
from wcmatch.fnmatch import escape

from ms_quant.errors import BadArgumentError

__all__ = ["REGEX", "check_pattern", "escape", "matches", "unmatched"]

REGEX = "re:"
LONGEST = 1000
MOST_ALTERNATIVES = 1000
_FLAGS = fnmatch.BRACE | fnmatch.CASE | fnmatch.FORCEUNIX | fnmatch.DOTMATCH


def matches(path: str, include: Iterable[str], exclude: Iterable[str] = ()) -> bool:
    """Whether some pattern includes a path and none excludes it.

    Raises:
        MsQuantError: as :func:`check_pattern`.
    """
    return _any(path, include) and not _any(path, exclude)


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
        compiled = [re.compile(glob) for glob in globs]
    except Exception as error:  # its limit error is no public name
        raise BadArgumentError(
            f"pattern {pattern!r:.80} is not usable ({error}), expected a glob such as "
            "'*.down_proj' or 'model.layers.{0..3}.*'"
        ) from None
    return lambda path: any(glob.fullmatch(path) for glob in compiled)


def _regex(pattern: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern.removeprefix(REGEX))
    except (re.error, OverflowError, RecursionError) as error:
        raise BadArgumentError(
            f"pattern {pattern!r:.80} is no regular expression ({error})"
        ) from None
    return lambda path: compiled.match(path) is not None
