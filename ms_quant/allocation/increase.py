"""By how much perplexity may grow."""

from __future__ import annotations

from ms_quant.errors import BadArgumentError


def check_increase(increase: float) -> None:
    """Raises:
    MsQuantError: it is not above 0 and at most 1.
    """
    if not 0 < increase <= 1:
        raise BadArgumentError(
            f"max ppl increase is {increase}, expected a share above 0 and up to 1, such as 0.005 "
            "or 0.5%"
        )


def parse_share(text: str) -> float:
    """A share such as ``"0.5%"`` or ``"0.005"``.

    Raises:
        MsQuantError: it is no number.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise BadArgumentError(
            f"max ppl increase is {text!r:.80}, expected a share such as 0.005 or 0.5%"
        ) from None
