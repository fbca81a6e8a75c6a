"""Regular expressions of others, matched within bounds.

The engine is that of the ``regex`` package: it reads the language of :mod:`re`, and gives up when
its time is over, where :mod:`re` may try as many ways as 2 to the power of a name's length.
"""

from __future__ import annotations

import math
import re
import time

import regex

from ms_quant.errors import BadArgumentError, short

SECONDS = 0.5
"""Of processor time for one name, which takes microseconds."""
ALL_SECONDS = 5.0
"""For all the names that a pattern is tried on."""
MOST_REPEATS = 1_000_000
"""Counts within counts are written out one by one when an expression is compiled."""
_COUNT = re.compile(r"\{(?:\d*,)?(\d+)\}|\{(\d+),\}")
_BRACE = re.compile(r"(\\.)|\{(?!\d*,?\d*\})", re.DOTALL)
_CLASS = re.compile(r"\[:\w*:\]")


class BoundedPattern:
    """A regular expression.

    Args:
        text: as :mod:`re` takes it.
        shown: how errors name it.

    Raises:
        MsQuantError: it is none, or counts too far.
    """

    def __init__(self, text: str, shown: str):
        self.shown, self._left = shown, ALL_SECONDS
        counts = [int(one or other) for one, other in _COUNT.findall(text)]
        if math.prod(count for count in counts if count > 2) > MOST_REPEATS:
            raise BadArgumentError(
                f"{shown} counts to more than {MOST_REPEATS} in all, expected less"
            )
        if found := _CLASS.search(text):
            raise BadArgumentError(f"{shown} has {found[0]!r:.40}, expected letters as in [a-z]")
        try:
            re.compile(text)
            # A brace that counts nothing is a brace there, and begins something else here.
            self._compiled = regex.compile(_BRACE.sub(lambda m: m[1] or r"\{", text))
        except (re.error, regex.error, OverflowError, RecursionError, TypeError) as error:
            raise BadArgumentError(f"{shown} is no regular expression ({error!s:.200})") from None

    def match(self, name: str, *, whole: bool = False) -> bool:
        """Whether it matches a name from its beginning, or the whole of it.

        Raises:
            MsQuantError: it takes too long.
        """
        started = time.process_time()
        try:
            match = self._compiled.fullmatch if whole else self._compiled.match
            found = match(name, timeout=max(1e-3, min(SECONDS, self._left)))
        except TimeoutError:
            raise BadArgumentError(
                f"{self.shown} takes more than {SECONDS:g} s for {short(name)}, expected one "
                "without repetitions in repetitions such as (a+)+"
            ) from None
        self._left -= time.process_time() - started
        return found is not None
