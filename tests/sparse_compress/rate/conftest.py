"""What codes cost, counted run by run: the oracle of prices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sparse_compress.rate.dictionary import Dictionary

RUN = 32


def count_bits(codes: np.ndarray, dictionary: Dictionary) -> int:
    """Bits of all codes, with pairs of d0 in the rows of fractals; words and headers excepted."""
    total = 0
    for row in codes.tolist():
        for start in range(0, len(row), RUN):
            run = 0
            for value in [*row[start : start + RUN], None]:
                if value == dictionary.first:
                    run += 1
                    continue
                total += 3 * ((run + 1) // 2)
                run = 0
                if value is not None:
                    total += dictionary.prices().get(value, 12)
    return total


@pytest.fixture(scope="session")
def code_bits() -> Callable[[np.ndarray, Dictionary], int]:
    return count_bits
