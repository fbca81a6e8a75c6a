"""Held-out perplexity of models with experts, quantized part by part.

    python benchmarks/experts_accuracy.py MODEL --calib TEXT --heldout TEXT [--only WORD]

Each row quantizes MODEL from the same calibration data (64 windows of 256 tokens) and predicts the
held-out text in windows of 256. ``increase`` is of the perplexity, with the standard error of the
paired losses; ``drafts`` is the share of what the layer for further tokens drafts that is what the
model itself predicts.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import ms_quant
from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.comparison import Comparison
from ms_quant.evaluation.drafts import drafts
from ms_quant.evaluation.perplexity import Measurement, measure
from ms_quant.formats.opening import FloatModel, ServedModel, open_model

EXPERTS_ONLY = "FLOAT,experts="
ROWS: dict[str, dict[str, Any]] = {
    "W8A8_DYNAMIC": {"scheme": "W8A8_DYNAMIC", "formats": ["ascend"]},
    "W8A8, MLPs W8A8_DYNAMIC, minmax": {"scheme": "W8A8"},
    "W8A8, MLPs W8A8_DYNAMIC, osl": {"scheme": "W8A8", "algorithm": "osl"},
    "the same, and MTP W8A8_DYNAMIC": {
        "scheme": "W8A8,mtp=W8A8_DYNAMIC",
        "algorithm": "osl,mtp=minmax",
        "formats": ["ascend"],
    },
    "experts W4A8_DYNAMIC, rest W8A8_DYNAMIC, minmax": {
        "scheme": "W8A8_DYNAMIC,experts=W4A8_DYNAMIC",
        "formats": ["ascend"],
    },
    "the same, gptq": {
        "scheme": "W8A8_DYNAMIC,experts=W4A8_DYNAMIC",
        "algorithm": "minmax,experts=gptq",
        "formats": ["ascend"],
    },
    "the same, awq": {
        "scheme": "W8A8_DYNAMIC,experts=W4A8_DYNAMIC",
        "algorithm": "minmax,experts=awq",
        "formats": ["ascend"],
    },
    "the same, awq+gptq": {
        "scheme": "W8A8_DYNAMIC,experts=W4A8_DYNAMIC",
        "algorithm": "minmax,experts=awq+gptq",
        "formats": ["ascend"],
    },
    "experts W4A16 in groups of 32, rest float, minmax": {
        "scheme": f"{EXPERTS_ONLY}W4A16",
        "scheme_options": {"group_size": 32},
    },
    "the same in groups, gptq": {
        "scheme": f"{EXPERTS_ONLY}W4A16",
        "algorithm": "gptq",
        "scheme_options": {"group_size": 32},
    },
}
CACHES = {"C8": "C8, recall windows", "C8_ABSMAX": "C8, largest magnitudes"}
ROWS |= {
    f"{linears}, {what}": {"scheme": scheme, "formats": ["ascend"], "kv_cache": kind}
    for linears, scheme in (("W8A8_DYNAMIC", "W8A8_DYNAMIC"), ("W8A8, MLPs dynamic", "W8A8"))
    for kind, what in CACHES.items()
}
DYNAMIC = "float, int8 cache, a scale a token"


class WithCache(FloatModel):
    """A float model with the static scales of a checkpoint's cache."""

    def __init__(self, directory: Path, scales: ServedModel):
        super().__init__(directory)
        self.cache_scales = scales.cache_scales


def main(args: argparse.Namespace) -> None:
    tokens = eval_windows(args.heldout, args.model, 256, args.windows)
    source = open_model(args.model)
    exact = measure(source, tokens)
    further = bool(source.config.further_layers)
    print("| linears | perplexity | increase | drafts |\n|---|---|---|---|")
    _show("float", exact, exact, source, tokens, further)
    for name, options in ROWS.items():
        if args.only and args.only not in name:
            continue
        if "mtp=" in options["scheme"] and not further:
            continue
        if options.get("kv_cache") == "C8_ABSMAX" and source.config.latent is None:
            continue
        with tempfile.TemporaryDirectory(prefix="experts-") as place:
            output = Path(place) / "out"
            algorithm, cache = options.get("algorithm", "minmax"), options.get("kv_cache", "")
            data = {"calibration": args.calib, "samples": 64, "seq_len": 256}
            static = options["scheme"].split(",")[0] == "W8A8"
            needs = static or "q" in algorithm or "osl" in algorithm or cache
            ms_quant.quantize_checkpoint(args.model, output, **options, **(data if needs else {}))
            model = open_model(output)
            _show(name, measure(model, tokens), exact, model, tokens, further)
            if cache and options["scheme"] != "W8A8":
                alone = WithCache(args.model, model)
                found = measure(alone, tokens)
                _show(f"float, {CACHES[cache]}", found, exact, alone, tokens, further)
    if not args.only or args.only in DYNAMIC:
        cached = measure(source, tokens, kv_cache="C8_DYNAMIC")
        _show(DYNAMIC, cached, exact, source, tokens, False)


def _show(
    name: str,
    found: Measurement,
    exact: Measurement,
    model: ServedModel,
    tokens: np.ndarray,
    further: bool,
) -> None:
    increase = ""
    if found is not exact:
        compared = Comparison.of(found, exact)
        error = compared.loss_difference_error or 0.0
        increase = f"{100 * math.expm1(compared.loss_difference):+.2f} % ± {100 * error:.2f}"
    accepted = f"{100 * drafts(model, tokens).acceptance:.1f} %" if further else ""
    print(f"| {name} | {found.found.perplexity:.3f} | {increase} | {accepted} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    main(parser.parse_args())
