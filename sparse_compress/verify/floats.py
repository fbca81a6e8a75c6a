"""The check of float tensors that ranks hold, and the counts of what was looked at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sparse_compress.layouts.fp16 import Floats, to_float16
from sparse_compress.ranks.reader import SparseModel

Counts = dict[str, int]


def count(checked: Counts, **found: int) -> None:
    """Adds to the counts of what was looked at."""
    for key, number in found.items():
        checked[key] = checked.get(key, 0) + number


def stored_floats(model: SparseModel) -> list[str]:
    """Names of the float tensors, a stored tied head among them."""
    return list(dict.fromkeys([*model.layout.float_names(), *model.layout.tables]))


def float_problems(
    model: SparseModel, source: Floats | None, name: str, checked: Counts
) -> Iterator[str]:
    """One float tensor: finite, the same wherever ranks share it, and the source's."""
    count(checked, float_tensors=1)
    original = model.layout.table_source(name)
    wrong = different = size = 0
    for start, part in model.float16_chunks(name):
        size += part.size
        wrong += part.size - int(np.count_nonzero(np.isfinite(part)))
        if source is not None:
            rows = slice(start, start + len(part))
            pieces = [chunk for _, chunk in source.float_chunks(original, rows)]
            expected = to_float16(np.concatenate(pieces).astype(np.float32, copy=False), name)
            different += int(np.count_nonzero(part.view("<u2") != expected.view("<u2")))
    if wrong:
        yield f"{name}: {wrong} of {size} values are NaN or inf, expected finite ones"
    if different:
        yield f"{name}: {different} of {size} values differ from the source's as float16"
