"""What holds where nothing else is asked for: for the commands, the functions and their pages."""

from __future__ import annotations

from dataclasses import dataclass

from ms_quant.algorithms import PLAIN
from ms_quant.schemes.table import FLOAT_CACHE


@dataclass(frozen=True)
class Defaults:
    """Attributes:
    scheme: what linears become.
    algorithm: how their numbers are chosen.
    samples: windows of calibration data.
    seq_len: tokens of a window, of calibration and of evaluation.
    seed: of the choice of windows.
    shard_bytes: largest data size of an output file.
    smoothing_target: where smoothing vectors go; "" is the format's first choice.
    kv_cache: how keys and values are cached.
    max_tokens: how many new tokens a generation makes at most.
    """

    scheme: str = "W8A8"
    algorithm: str = PLAIN
    samples: int = 64
    seq_len: int = 256
    seed: int = 0
    shard_bytes: int = 4 << 30
    smoothing_target: str = ""
    kv_cache: str = FLOAT_CACHE
    max_tokens: int = 64


DEFAULTS = Defaults()
