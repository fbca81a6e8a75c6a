"""A checkpoint quantized as a recipe says, proved and measured.

    python examples/checkpoint.py [MODEL] [OUTPUT]

The recipe keeps ``down_proj`` in 8 bits with searched smoothing and gives everything else 4-bit
weights in groups. MindSpore is not needed. Without arguments the bundled model is quantized.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ms_quant

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT = ROOT / "models" / "stdlib-qwen3-6m", ROOT / "models" / "text"
RECIPE = {
    "apiversion": "ms_quant_v1",
    "rules": [
        {"scheme": "W8A8_DYNAMIC", "include": ["*.down_proj"]},
        {
            "scheme": "W4A16",
            "options": {"group_size": 64},
            "algorithms": ["ssz"],
            "include": ["*"],
            "exclude": ["*.down_proj"],
        },
    ],
    "steps": [{"algorithm": "smoothquant", "options": {"alpha": 0.7}, "include": ["*.down_proj"]}],
}


def show(step: str, part: float) -> None:
    """Progress on one line of standard error."""
    print(f"\r{step}: {100 * part:3.0f} %  ", end="", file=sys.stderr)


def main() -> None:
    """Quantizes, proves and measures."""
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("quantized")
    result = ms_quant.quantize_checkpoint(
        model,
        output,
        recipe=ms_quant.load_recipe(RECIPE),
        calibration=TEXT / "calibration.txt",
        samples=8,
        seq_len=128,
        progress=show,
    )
    (made,) = result.outputs
    print(f"\n{made.path}: {made.scheme} as {made.format}, {made.quantized_linears} linears")
    for row in made.report[:4]:
        print(f"  {row.group}: {row.scheme} by {row.algorithm} {dict(row.chosen) or ''}", end="")
        print("" if row.seconds is None else f" in {row.seconds:.2f} s")
    for line in (*made.served_by, *made.not_served_by):
        print(f"  {line}")

    proof = ms_quant.verify_checkpoint(output, model)
    worst = max(proof.layers, key=lambda layer: layer.output_error)
    print(f"{proof.verdict}: the largest output error is {worst.output_error:.4f}, {worst.layer}")

    for directory in (model, output):
        found = ms_quant.perplexity(directory, TEXT / "heldout.txt", seq_len=128, windows=8)
        print(f"{directory.name}: perplexity {found.perplexity:.3f} over {found.tokens} tokens")


if __name__ == "__main__":
    main()
