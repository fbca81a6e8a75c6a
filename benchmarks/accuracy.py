"""Held-out perplexity, bytes and seconds of every scheme with every algorithm that suits it.

    python benchmarks/accuracy.py MODEL --calib TEXT --heldout TEXT [--samples 64] [--windows 64]
        [--no-twin] [--only "W8A8 *" ...] [--json FILE] [--table FILE.md]

Each row quantizes MODEL and its outlier twin from the same calibration data (windows of 256
tokens) and predicts the first windows of the held-out text. The twin computes the same function in
float: a few channels of every norm are 32 times as large, and what reads them as much smaller
(tools/inject_outliers.py). A model that was trained on much text has outliers of its own and needs
no twin: tools/make_smollm2.py makes one.

``bytes`` are those of the quantized linears' tensors as the scheme's checkpoint holds them, over
the number of their weights; ``seconds`` are of quantizing, ``cpu`` of all its threads. ``error`` is
the standard error of the loss's difference from float's, as ``compare`` says it.

Rows that the JSON file already holds are not measured again, unless the float perplexities differ
by more than rounding, or the windows or the version differ. Of a row that is refused the table has
the sentence that refuses it, and the next run tries it again.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant import __version__
from ms_quant.algorithms import ALGORITHMS, PLAIN
from ms_quant.cli.console import use_mindspore
from ms_quant.data.calibration import eval_windows
from ms_quant.errors import MsQuantError
from ms_quant.evaluation.comparison import Comparison, compare
from ms_quant.evaluation.perplexity import Measurement, measure
from ms_quant.files.atomic import write_json
from ms_quant.formats.checks import format_of
from ms_quant.formats.opening import FloatModel, JobModel
from ms_quant.models.config import ModelConfig
from ms_quant.pipeline.planning import linear_paths
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_blocks
from ms_quant.plan.plan import Plan
from ms_quant.schemes.support import support_of
from ms_quant.schemes.table import KV_CACHES, SCHEMES, STATIC_CACHE

INJECT = Path(__file__).parent.parent / "tools" / "inject_outliers.py"
COMBINED = (
    *("smoothquant+gptq", "osl+gptq", "awq+gptq", "quarot+gptq"),
    *("quarot+smoothquant", "quarot+osl", "clip+gptq"),
)
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


def rows(config: ModelConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Scheme, algorithms and options of the scheme, of what divides the model's linears."""
    for name, scheme in SCHEMES.items():
        if not support_of(name):  # for networks, not for checkpoints
            continue
        for options, few in _options(name, config):
            for algorithm in FEW if few else (PLAIN, *ALGORITHMS, *COMBINED):
                parts = () if algorithm == PLAIN else algorithm.split("+")
                if scheme.algorithm in parts or any(ALGORITHMS[p].suits(scheme) for p in parts):
                    continue
                yield name, algorithm, options
    for kind in KV_CACHES:
        yield CACHED, PLAIN, {"kv_cache": kind}


def _options(name: str, config: ModelConfig) -> Iterator[tuple[Row, bool]]:
    """Options of a scheme, and whether only the algorithms of FEW are measured with them."""
    shapes = config.parameter_shapes()
    widths = {shapes[f"{path}.weight"][1] for path in linear_paths(config)}
    scheme = SCHEMES[name]
    default = getattr(scheme.weight, "group_size", 0) if "group_size" in scheme.options else 0
    group = next(size for size in (default, 64, 32, 0) if _divides(size, widths))
    base = {} if group == default else {"group_size": group}
    yield base, name in LIKE_W8A8
    for variant in VARIANTS.get(name, ()):
        if _divides(variant.get("group_size", 0), widths):
            yield {**base, **variant}, True


def _divides(group_size: int, widths: set[int]) -> bool:
    return not group_size or all(width % group_size == 0 for width in widths)


@dataclass(frozen=True)
class Data:
    """What every row is measured with.

    Attributes:
        calib: calibration file.
        samples: windows of it.
        tokens: int32 (windows, tokens), held out.
        floats: what the float models predict of them, by name.
    """

    calib: Path
    samples: int
    tokens: np.ndarray
    floats: dict[str, Measurement]


def measure_row(name: str, model: Path, row: tuple[str, str, Row], data: Data) -> Row:
    """Quantizes one model in one way and evaluates it."""
    scheme, algorithm, options = row
    options = dict(options)
    cache = options.pop("kv_cache", None)
    held = cache if cache == STATIC_CACHE else ""
    with tempfile.TemporaryDirectory() as directory:
        calibrated = held or _calibrated(scheme, algorithm)
        request = QuantizeOptions(
            model,
            Path(directory) / "out",
            scheme,
            algorithm,
            scheme_options=options,
            kv_cache=held,
            calib=data.calib if calibrated else None,
            samples=data.samples if calibrated else None,
        )
        try:
            checked = prepare(request)
        except MsQuantError as error:
            return {"refused": str(error).replace(str(model), name)}
        job, started, cpu = checked.job(), time.monotonic(), time.process_time()
        with job.open():
            run_blocks(checked, job, lambda index, part: None)
            found: Row = {
                "bytes": bytes_per_weight(checked.plan),
                "seconds": round(time.monotonic() - started, 1),
                "cpu": round(time.process_time() - cpu, 1),
            }
            served = JobModel(checked.plan, job, checked.tensors)
            before = data.floats[name]
            found |= _result(compare(served, before, data.tokens, kv_cache=cache))
            if served.phased:
                found["decode"] = _result(compare(served, before, data.tokens, decode=True))
            job.remove()
    return found


def _result(found: Comparison) -> Row:
    return {"perplexity": found.model.perplexity, "error": found.loss_difference_error}


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


def table(results: dict[str, Row], floats: dict[str, float], chosen: list[str]) -> list[str]:
    """The rows in Markdown."""
    names = list(floats)
    lines = [
        f"| scheme | options | algorithms | bytes/weight | {' | '.join(names)} | CPU s |",
        "|---|---|---|---" + "|---" * len(names) + "|---|",
    ]
    refused = []
    for entry in chosen:
        found, (scheme, algorithm, options) = results.get(entry), json.loads(entry)
        if found is None:
            continue
        first = found[names[0]]
        named = ", ".join(f"{name} {value}" for name, value in options.items())
        if "refused" in first:
            refused.append(f"{scheme} {named} {algorithm}: {first['refused']}")
            continue
        cpu = f"{first['cpu']:.0f}" if "cpu" in first else "-"
        cells = " | ".join(_cell(found[name], floats[name]) for name in names)
        lines.append(
            f"| {scheme} | {named} | {algorithm} | {first['bytes']:.3f} | {cells} | {cpu} |"
        )
    return [*lines, *([""] if refused else []), *refused]


def _cell(found: Row, before: float) -> str:
    text, decode = _change(found, before), found.get("decode")
    if decode is None:
        return text
    decode = decode if isinstance(decode, dict) else {"perplexity": decode}
    return f"{text}; decode {_change(decode, before)}"


def _change(found: Row, before: float) -> str:
    ratio = found["perplexity"] / before
    known = found.get("error")
    error = "" if known is None else f" ± {100 * ratio * known:.2f}"
    return f"{found['perplexity']:.3f} ({100 * (ratio - 1):+.2f}{error} %)"


def key(scheme: str, algorithm: str, options: Row) -> str:
    return json.dumps([scheme, algorithm, options])


def _same(kept: Row | None, of: Row) -> bool:
    """Whether rows of an earlier run are of the same models and text."""
    if kept is None or {**kept, "float": set(kept["float"])} != {**of, "float": set(of["float"])}:
        return False
    pairs = ((kept["float"][name], value) for name, value in of["float"].items())
    return all(math.isclose(before, now, rel_tol=1e-5) for before, now in pairs)


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--no-twin", action="store_true", help="only the model itself")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help='"SCHEME ALGORITHMS [OPTION=VALUE]" patterns'
    )
    parser.add_argument("--json", type=Path, default=Path("accuracy.json"))
    parser.add_argument("--table", type=Path, help="Markdown file, written after each row")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    use_mindspore()
    tokens = eval_windows(arguments.heldout, arguments.model, 256, arguments.windows)
    with tempfile.TemporaryDirectory() as directory:
        models = {"model": arguments.model}
        if not arguments.no_twin:
            models["twin"] = Path(directory) / "twin"
            runpy.run_path(str(INJECT))["inject"](arguments.model, models["twin"])
        floats = {name: measure(FloatModel(path), tokens) for name, path in models.items()}
        data = Data(arguments.calib, arguments.samples, tokens, floats)
        measure_all(models, data, arguments)


def measure_all(models: dict[str, Path], data: Data, arguments: argparse.Namespace) -> None:
    """Measures the rows that are asked for and not kept, and writes the table."""
    floats = {name: each.found.perplexity for name, each in data.floats.items()}
    of: Row = {"windows": len(data.tokens), "samples": data.samples, "version": __version__}
    of["float"] = floats
    results = _kept(arguments.json, of)
    every = list(rows(FloatModel(arguments.model).config))
    twin = f" (twin {floats['twin']:.4f})" if "twin" in floats else ""
    count = data.floats["model"].found.tokens
    head = f"{count} held-out tokens; float perplexity {floats['model']:.4f}"

    def write() -> str:
        lines = table(results, floats, [key(*row) for row in every])
        text = "\n".join([head + twin, "", *lines, ""])
        if arguments.table:
            arguments.table.write_text(text)
        return text

    for pattern in arguments.only:  # in the order asked for
        for row in sorted(every, key=_searches):
            if key(*row) in results or not _asked(row, pattern):
                continue
            found = {name: measure_row(name, path, row, data) for name, path in models.items()}
            results[key(*row)] = found
            print(row, found, flush=True)
            write_json(arguments.json, {"of": of, "rows": results})
            write()
    print(write())


def _asked(row: tuple[str, str, Row], pattern: str) -> bool:
    name, options = f"{row[0]} {row[1]}", [f"{key}={value}" for key, value in row[2].items()]
    return fnmatch(name, pattern) or fnmatch(" ".join([name, *options]), pattern)


def _kept(path: Path, of: Row) -> dict[str, Row]:
    """The rows of an earlier run of the same that were not refused."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept.get("rows", {}) if _same(kept.get("of"), of) else {}
    return {entry: row for entry, row in found.items() if "refused" not in row["model"]}


if __name__ == "__main__":
    main()
