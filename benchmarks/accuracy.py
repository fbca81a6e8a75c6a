"""Held-out perplexity, bytes and seconds of every scheme with every algorithm that suits it.

    python benchmarks/accuracy.py MODEL --calib TEXT --heldout TEXT [--windows 64] [--json FILE]
        [--table FILE.md]

Each row quantizes MODEL and its outlier twin from the same calibration data (64 windows of 256
tokens) and predicts the first windows of the held-out text. The twin computes the same function in
float: a few channels of every norm are 32 times as large, and what reads them as much smaller
(tools/inject_outliers.py). ``bytes`` are those of the quantized linears' tensors as the scheme's
checkpoint holds them, over the number of their weights; ``seconds`` are of quantizing.

Rows that the JSON file already holds are not measured again, unless the float perplexities differ
by more than rounding, or the windows or the version differ.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.algorithms import ALGORITHMS, PLAIN
from ms_quant.cli.console import use_mindspore
from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.files.atomic import write_json
from ms_quant.formats.checks import format_of
from ms_quant.formats.opening import FloatModel, JobModel
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_blocks
from ms_quant.plan.plan import Plan
from ms_quant.schemes.support import support_of
from ms_quant.schemes.table import KV_CACHES, SCHEMES, STATIC_CACHE

INJECT = Path(__file__).parent.parent / "tools" / "inject_outliers.py"
COMBINED = ("smoothquant+gptq", "osl+gptq", "awq+gptq", "quarot+gptq")
VARIANTS: dict[str, list[dict[str, Any]]] = {  # with the algorithms of FEW only
    "W8A16": [{"group_size": 128}],
    "W4A16": [{"group_size": 0}, {"group_size": 32}, {"symmetric": False}],
    "W4A8_DYNAMIC": [{"group_size": 64}],
    "W4A4_MXFP4": [{"rule": "mxfp4_cann0"}, {"rule": "mxfp4_cann2_7.25"}],
}
FEW = (PLAIN, "awq", "gptq")
CACHED = "W8A16"  # the scheme whose linears cost least, so that the cache's cost is seen
LIKE_W8A8 = ("W8A8_PER_TENSOR", "W8A8_PER_CHANNEL")  # in their algorithms, too
Row = dict[str, Any]


def rows() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Scheme, algorithms and options of the scheme."""
    for name, scheme in SCHEMES.items():
        if not support_of(name):  # for networks, not for checkpoints
            continue
        for options in ({}, *VARIANTS.get(name, ())):
            few = options or name in LIKE_W8A8
            for algorithm in FEW if few else (PLAIN, *ALGORITHMS, *COMBINED):
                parts = () if algorithm == PLAIN else algorithm.split("+")
                if scheme.algorithm in parts or any(ALGORITHMS[p].suits(scheme) for p in parts):
                    continue
                yield name, algorithm, options
    for kind in KV_CACHES:
        yield CACHED, PLAIN, {"kv_cache": kind}


def measure(
    model: Path, scheme: str, algorithm: str, options: Row, calib: Path, tokens: np.ndarray
) -> Row:
    """Quantizes one model in one way and evaluates it."""
    options = dict(options)
    cache = options.pop("kv_cache", None)
    held = cache if cache == STATIC_CACHE else ""
    with tempfile.TemporaryDirectory() as directory:
        data = calib if held or _calibrated(scheme, algorithm) else None
        request = QuantizeOptions(
            model,
            Path(directory) / "out",
            scheme,
            algorithm,
            scheme_options=options,
            kv_cache=held,
            calib=data,
        )
        checked = prepare(request)
        job, started = checked.job(), time.monotonic()
        with job.open():
            run_blocks(checked, job, lambda index, part: None)
            seconds = time.monotonic() - started
            served = JobModel(checked.plan, job, checked.tensors)
            found = {
                "perplexity": perplexity(served, tokens, kv_cache=cache).perplexity,
                "bytes": bytes_per_weight(checked.plan),
                "seconds": round(seconds, 1),
            }
            if served.phased:
                found["decode"] = perplexity(served, tokens, decode=True).perplexity
            job.remove()
    return found


def bytes_per_weight(plan: Plan) -> float:
    """Bytes of the quantized linears' tensors over the number of their weights."""
    shapes, tensors = plan.config.parameter_shapes(), format_of(plan).tensor_plans(plan)
    stored = sum(tensor.bytes for tensor in tensors if tensor.part is not None)
    return stored / sum(math.prod(shapes[f"{path}.weight"]) for path in plan.quantized())


def _calibrated(scheme: str, algorithm: str) -> bool:
    algorithms = [*algorithm.split("+"), SCHEMES[scheme].algorithm]
    return SCHEMES[scheme].needs_calibration or any(
        ALGORITHMS[name].calibrated for name in algorithms if name in ALGORITHMS
    )


def _searches(row: tuple[str, str, Row]) -> int:
    return sum(ALGORITHMS[name].searches for name in row[1].split("+") if name in ALGORITHMS)


def table(results: dict[str, Row], floats: dict[str, float]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| scheme | options | algorithms | bytes/weight | model | twin | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme, algorithm, options in rows():
        found = results.get(key(scheme, algorithm, options))
        if found is None:
            continue
        chosen = ", ".join(f"{name} {value}" for name, value in options.items())
        cells = [_cell(found[which], floats[which]) for which in ("model", "twin")]
        lines.append(
            f"| {scheme} | {chosen} | {algorithm} | {found['model']['bytes']:.3f} "
            f"| {cells[0]} | {cells[1]} | {found['model']['seconds']:.0f} |"
        )
    return lines


def _cell(found: Row, before: float) -> str:
    text = f"{found['perplexity']:.3f} ({100 * (found['perplexity'] / before - 1):+.2f} %)"
    return f"{text}; decode {found['decode']:.3f}" if "decode" in found else text


def key(scheme: str, algorithm: str, options: Row) -> str:
    return json.dumps([scheme, algorithm, options])


def _same(kept: Row | None, of: Row) -> bool:
    """Whether rows of an earlier run are of the same models and text."""
    if kept is None or {**kept, "float": 0} != {**of, "float": 0}:
        return False
    return all(
        math.isclose(kept["float"][name], of["float"][name], rel_tol=1e-5) for name in of["float"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("accuracy.json"))
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    use_mindspore()
    tokens = eval_windows(arguments.heldout, arguments.model, 256, arguments.windows)
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        twin = Path(directory) / "twin"
        runpy.run_path(str(INJECT))["inject"](arguments.model, twin)
        models = {"model": arguments.model, "twin": twin}
        floats = {
            name: perplexity(FloatModel(path), tokens).perplexity for name, path in models.items()
        }
        of = {"windows": arguments.windows, "version": __version__, "float": floats}
        results = kept.get("rows", {}) if _same(kept.get("of"), of) else {}
        for row in sorted(rows(), key=_searches):
            if key(*row) not in results:
                results[key(*row)] = {
                    name: measure(path, *row, arguments.calib, tokens)
                    for name, path in models.items()
                }
                print(row, results[key(*row)], flush=True)
                write_json(arguments.json, {"of": of, "rows": results})
    head = (
        f"{tokens[:, 1:].size} held-out tokens; float perplexity {floats['model']:.4f} "
        f"(twin {floats['twin']:.4f})"
    )
    text = "\n".join([head, "", *table(results, floats), ""])
    print(text)
    if arguments.table:
        arguments.table.write_text(text)


if __name__ == "__main__":
    main()
