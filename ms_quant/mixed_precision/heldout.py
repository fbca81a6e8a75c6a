"""The text that choices are measured on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ms_quant import data
from ms_quant.data.calibration import Note, eval_windows, load_tokens
from ms_quant.errors import BadArgumentError, MsQuantError
from ms_quant.pipeline.options import QuantizeOptions
from ms_quant.statistics.kept import spread

OTHER_WINDOWS, BUNDLED_WINDOWS = 8, 32
"""Of the calibration data and of a bundled text, where no held-out text is given. Other windows of
the same book flatter static ranges, which fit it."""
BUNDLED = Path(data.__file__).parent / "heldout.txt"
LEAST_WINDOWS = 8
OTHER_SEED = 1_000_003


def heldout_windows(
    job: QuantizeOptions, text: Path | None, needed: bool, note: Note
) -> np.ndarray | None:
    """The tokens that perplexity is measured on; None where there are few and none are needed.

    Args:
        job: the model and the calibration data.
        text: the held-out text; None is other windows of the calibration data, and a text that
            comes with the package.
        needed: whether something has to be measured.
        note: told what is measured on where no text was given.

    Returns:
        int32 (windows, tokens).

    Raises:
        MsQuantError: the file cannot be read, or there are few windows where some are needed.
    """
    samples, length, _ = job.windows
    if length < 2:
        raise BadArgumentError(f"seq_len is {length}, expected at least 2 to predict a token")
    if text is not None:
        return eval_windows(text, job.model, length, samples, note)
    others = bundled = np.zeros((0, length), np.int32)
    if job.calib is not None:
        others = _others(job)
        bundled = _bundled(job)
    if len(others) + len(bundled) >= LEAST_WINDOWS:
        note(
            f"perplexity is measured on {len(others)} other windows of {job.calib} and "
            f"{len(bundled)} of English prose and verse; --heldout FILE with what the model will "
            "read says more"
        )
        return np.concatenate([windows for windows in (others, bundled) if len(windows)])
    if not needed:
        return None
    raise BadArgumentError(
        f"{job.calib}: has {len(others)} windows of {length} tokens beside those that calibration "
        f"takes, expected at least {LEAST_WINDOWS} to measure perplexity on, or --heldout FILE"
    )


def _others(job: QuantizeOptions) -> np.ndarray:
    """Windows of the calibration data that calibration does not take."""
    assert job.calib is not None
    samples, length, seed = job.windows
    load = partial(load_tokens, job.calib, job.model)
    used = {window.tobytes() for window in load(samples, length, seed)}
    drawn = load(samples + 2 * OTHER_WINDOWS, length, seed + OTHER_SEED)
    return np.array([window for window in drawn if window.tobytes() not in used][:OTHER_WINDOWS])


def _bundled(job: QuantizeOptions) -> np.ndarray:
    """Windows from all of a text that comes with the package; none where the model has no
    tokenizer."""
    try:
        windows = eval_windows(BUNDLED, job.model, job.windows.seq_len)
    except MsQuantError:
        return np.zeros((0, job.windows.seq_len), np.int32)
    return windows[spread(len(windows), min(BUNDLED_WINDOWS, len(windows)))]
