"""A W8A8SC checkpoint for the Atlas 300I Duo: half of the weights pruned, the rest coded.

    python examples/w8a8sc.py [MODEL] [OUTPUT]

MindSpore is not needed. Without arguments the bundled model is compressed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ms_quant
import sparse_compress

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT = ROOT / "models" / "stdlib-qwen3-6m", ROOT / "models" / "text"


def main() -> None:
    """Compresses, and measures what that cost."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("compressed")
    result = sparse_compress.compress_checkpoint(
        model,
        output,
        calibration=TEXT / "calibration.txt",
        sparsity=0.5,  # or target_ratio=0.45, which takes longer and costs less quality
        samples=8,
        seq_len=128,
    )
    print(f"{result.path}: {result.format}, {result.compressed_linears} linears of each rank")
    print(f"  {result.raw_bytes:,} bytes of int8 weights take {result.stored_bytes:,}")
    print(f"  ratio {result.ratio:.3f}")
    for path, reason in result.uncompressed.items():
        print(f"  {path} stays float16: {reason}")

    for directory in (model, output):
        found = ms_quant.perplexity(directory, TEXT / "heldout.txt", seq_len=128, windows=8)
        print(f"{directory.name}: perplexity {found.perplexity:.3f} over {found.tokens} tokens")


if __name__ == "__main__":
    main()
