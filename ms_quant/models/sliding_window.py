"""Whether a sliding window is in force in a decoder whose config speaks of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms_quant.errors import BadFileError

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_WINDOW = 4096  # of transformers, where a family has one and the key is absent
DEFAULT_FIRST = 28


def check_windows(
    raw: Mapping[str, Any],
    layers: int,
    max_position: int,
    flagged: bool,
    where: str,
    first: int | None = None,
) -> None:
    """Refuses a window that some layer would have.

    A window as long as the longest context hides no token, so it is none.

    Args:
        raw: the content of ``config.json``; a family's default window is in it.
        layers: how many the model has.
        max_position: the longest context.
        flagged: whether the family has a window only where ``use_sliding_window`` says so.
        where: the file, for errors.
        first: the first layer that would have it; None is as ``max_window_layers`` says.

    Raises:
        MsQuantError: a layer has a window or another kind of attention; names the key.
    """
    window, use = raw.get("sliding_window"), raw.get("use_sliding_window")
    if flagged and not use and window == 0:
        window = None  # so transformers 5 says that it is not in force
    if window is not None and (type(window) is not int or window <= 0):
        raise BadFileError(f"{where}: sliding_window is {window!r:.80}, expected a positive number")
    if use is not None and not isinstance(use, bool):
        raise BadFileError(f"{where}: use_sliding_window is {use!r:.80}, expected true or false")
    kinds = raw.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise BadFileError(f"{where}: layer_types is {kinds!r:.80}, expected a list")
    if kinds is not None and len(kinds) != layers:
        raise BadFileError(
            f"{where}: layer_types has {len(kinds)} entries, expected one for each of {layers} "
            "layers"
        )
    if flagged and use and window is None and "sliding_window" not in raw:
        window = DEFAULT_WINDOW
    long = window is not None and window >= max_position
    others = [kind for kind in kinds or () if kind != FULL and not (kind == SLIDING and long)]
    if others:
        raise BadFileError(
            f"{where}: layer_types has {others[0]!r:.80}, expected {FULL!r} in every layer: only "
            "full attention is supported"
        )
    if window is None or long:
        return
    if first is None and flagged:
        first = _first_windowed(raw, where)
    # Where there are layer_types they say which layers have the window.
    if flagged and (kinds or not use or (first or 0) >= layers):
        return
    hint = "use_sliding_window false" if flagged else "no such key, null"
    raise BadFileError(
        f"{where}: sliding_window is {window}, expected {hint} or at least "
        f"max_position_embeddings {max_position}: only full attention is supported"
    )


def _first_windowed(raw: Mapping[str, Any], where: str) -> int:
    first = raw.get("max_window_layers", DEFAULT_FIRST)
    if type(first) is not int or first < 0:
        raise BadFileError(f"{where}: max_window_layers is {first!r:.80}, expected a number")
    return first


def without_windows(raw: Mapping[str, Any], flagged: bool) -> dict[str, Any]:
    """How a ``config.json`` says that no layer has a window, where it could be taken to say so.

    Runtimes read a window that is not in force in different ways: vLLM gives every layer of Qwen2
    one where ``use_sliding_window`` is set, and transformers' Mistral one of 4096 where nothing is.

    Args:
        raw: as :func:`check_windows` has accepted it.
        flagged: as there.
    """
    changes: dict[str, Any] = {}
    if raw.get("use_sliding_window"):
        changes["use_sliding_window"] = False
    if raw.get("sliding_window") is not None and (not flagged or raw["sliding_window"] == 0):
        changes["sliding_window"] = None
    if any(kind != FULL for kind in raw.get("layer_types") or ()):
        changes["layer_types"] = [FULL] * len(raw["layer_types"])
    return changes
