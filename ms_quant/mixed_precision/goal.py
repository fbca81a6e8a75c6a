"""The goals that there are: a loss that is allowed, or a size of what is stored or read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ms_quant.allocation.increase import check_increase
from ms_quant.errors import BadArgumentError
from ms_quant.mixed_precision.costs import FLOAT, Cost, all_weights, bits_between
from ms_quant.models.names import GroupId

Costs = Mapping[GroupId, Mapping[str, Cost]]


def check_goal(increase: float | None, bits: float | None, token_bytes: int | None) -> None:
    """Refuses none or several, and what no model can have."""
    given = sum(goal is not None for goal in (increase, bits, token_bytes))
    if given != 1:
        found = "needs a goal" if not given else "has one goal, and several are given"
        raise BadArgumentError(
            f"choosing schemes {found}, expected one of --max-ppl-increase, --target-bits and "
            "--target-bytes-per-token"
        )
    if increase is not None:
        check_increase(increase)
    if bits is not None and not 1 <= bits <= 16:
        raise BadArgumentError(f"target bits is {bits:g}, expected 1 to 16 bits of a weight")
    if token_bytes is not None and token_bytes < 1:
        raise BadArgumentError(f"target bytes per token is {token_bytes}, expected 1 or more")


def bits_of(token_bytes: int, fixed: int, known: Costs) -> float:
    """Stored bits of a weight of the groups where decode reads so many bytes for a token.

    Args:
        token_bytes: what it reads of all weights.
        fixed: what it reads whatever is chosen.
        known: group to what it costs in each scheme.
    """
    return 8 * (token_bytes - fixed) / all_weights(known)


def bytes_between(known: Costs, choose: Sequence[str], fixed: int) -> tuple[int, int]:
    """The fewest and the most bytes that decode reads for a token in choices among schemes."""
    weights = all_weights(known)
    least, most = (round(bits * weights / 8) for bits in bits_between(known, choose))
    return fixed + least, fixed + most


def check_size(
    bits: float | None, token_bytes: int | None, known: Costs, choose: Sequence[str], fixed: int
) -> None:
    """Refuses a size that no choice has, and one at which all stays float."""
    if bits is not None:
        least, most = bits_between(known, choose)
        smallest, all_of_it = f"{least:.3f} bits of a weight", f"{most:g}"
        target, asked = bits, f"target bits {bits:g}"
        takes = "take, scales and all,"
    elif token_bytes is not None:
        least, most = bytes_between(known, choose, fixed)
        smallest, all_of_it = f"{least:,} bytes", f"{most:,}"
        target, asked = token_bytes, f"target bytes per token {token_bytes:,}"
        takes = "read, scales, norms and the head included,"
    else:
        return
    if least > target:
        raise BadArgumentError(
            f"{asked} cannot be reached: the smallest that {', '.join(choose)} {takes} is "
            f"{smallest}"
        )
    if FLOAT in choose and target >= most:
        raise BadArgumentError(
            f"{asked}: every linear may stay float, nothing is left to quantize; expected fewer "
            f"than {all_of_it}"
        )
