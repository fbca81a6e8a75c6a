"""Makes tests/golden/float8/library.json: FP8 as torch and transformers decode it.

Needs torch and transformers. Codes and scales are formulas, which the tests repeat, of matrices
whose blocks of 128 x 128 are whole: transformers 5.24 takes N / scale_rows for the height of a
block, so that it refuses the others or decodes them otherwise.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

ROWS, COLUMNS, BLOCK = 384, 256, 128


def decoded_codes() -> list[float | None]:
    """What each of the 256 codes stands for; None for NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    return [None if value != value else value for value in values]


def blocks(scale: torch.dtype) -> str:
    """The sha256 of a weight in float32."""
    i, j = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)[None]
    codes = ((37 * i + 11 * j) % 126 + 128 * ((i + j) % 2)).to(torch.uint8)
    i, j = torch.arange(ROWS // BLOCK)[:, None], torch.arange(COLUMNS // BLOCK)[None]
    if scale in (torch.uint8, torch.float8_e8m0fnu):
        scales = (115 + 3 * i + j).to(torch.uint8).view(scale)
    else:
        scales = ((8 + 3 * i + 5 * j) / 4096 / 3).to(scale)
    weight = codes.view(torch.float8_e4m3fn)
    made = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    return hashlib.sha256(made.numpy().tobytes()).hexdigest()


def main() -> None:
    types = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U8": torch.uint8,
    }
    made = {
        "made by": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "e4m3": decoded_codes(),
        "blocks": {code: blocks(dtype) for code, dtype in types.items()},
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in made.items()]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
