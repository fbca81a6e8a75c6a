"""How well each measure of an analysis predicts the loss that one quantized group costs.

    python benchmarks/sensitivity.py MODEL --calib TEXT --heldout TEXT [--schemes W8A8,W4A16]
        [--twin] [--groups '*.down'] [--windows 32] [--samples 64] [--json FILE]

MODEL (with --twin its outlier twin, tools/inject_outliers.py) is analysed, and quantized once in
each scheme. Then one group at a time has its quantized linears in the float model, and the
held-out text is predicted. The tables have the rank correlation (Spearman) of each measure with
the increase of the loss, over all groups and schemes that were measured, and over those whose
increase is more than two standard errors: the ranks of the others are noise. `linear` is the
linearity theorem of HIGGS (arXiv 2411.17525): the group's relative error times a factor that a
finer scheme's propagated error gives. With --repeats the CPU seconds of the analysis and of a
min-max quantization with the same data are printed, too.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.analysis.records import METRICS, GroupSensitivity, Sensitivity
from ms_quant.analysis.run import analyze
from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.comparison import STANDARD_ERRORS, paired_difference
from ms_quant.evaluation.perplexity import measure
from ms_quant.files.atomic import write_json
from ms_quant.formats.opening import FloatModel, JobModel
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.quantize import quantize_checkpoint
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_blocks
from ms_quant.schemes.table import SCHEMES

INJECT = Path(__file__).parent.parent / "tools" / "inject_outliers.py"
FINE = "W8A8_DYNAMIC"  # whose propagated error gives the factors of `linear`


class OneGroup(FloatModel):
    """The float model with the quantized linears of one group."""

    def __init__(self, directory: Path, quantized: JobModel, linears: tuple[str, ...]):
        super().__init__(directory)
        self.quantized, self.chosen = quantized, linears

    def linear(self, path: str) -> QuantizedLinear | None:
        return self.quantized.linear(path) if path in self.chosen else None


def increases(
    model: Path,
    scheme: str,
    groups: list[GroupSensitivity],
    calib: Path,
    tokens: np.ndarray,
    samples: int,
) -> dict[str, tuple[float, float | None]]:
    """Path of each group to what the mean loss increases when it alone is quantized, and to the
    standard error of that."""
    exact = measure(FloatModel(model), tokens).losses
    with tempfile.TemporaryDirectory() as directory:
        data = {"calib": calib, "samples": samples} if SCHEMES[scheme].needs_calibration else {}
        options = QuantizeOptions(model, Path(directory) / "out", scheme, **data)
        checked = prepare(options)
        job = checked.job()
        with job.open():
            run_blocks(checked, job, lambda index, part: None)
            served = JobModel(checked.plan, job, checked.tensors)
            found = {}
            for group in groups:
                one = OneGroup(model, served, group.linears)
                found[group.path] = paired_difference(measure(one, tokens).losses, exact)
                mean, error = found[group.path]
                print(f"  {scheme} {group.path}: {mean:+.6f} ± {error:.6f}", flush=True)
            job.remove()
    return found


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks; equal values share theirs."""
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: list[float]) -> np.ndarray:
    array = np.asarray(values)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])


def predictions(found: Sensitivity, scheme: str, group: GroupSensitivity) -> dict[str, float]:
    """Each measure of a group in a scheme."""
    measures = {metric: group.score(scheme, metric) for metric in METRICS}
    if FINE in found.schemes:
        fine, own = group.schemes[FINE], group.schemes[scheme].output_error
        measures["linear"] = own * fine.loss_increase / max(fine.output_error, 1e-30)
    return measures


def best_seconds(repeats: int, run: Callable[[], object]) -> list[float]:
    """The CPU seconds of some runs, the fastest first: other work on the machine counts less."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        found.append(round(time.process_time() - started, 2))
    return sorted(found)


def costs(model: Path, calib: Path, schemes: list[str], samples: int, repeats: int) -> dict:
    """CPU seconds of a calibrated min-max quantization, and of the analysis of the first scheme and
    of all."""
    found: dict[str, list[float]] = {}

    def quantize() -> None:
        with tempfile.TemporaryDirectory() as directory:
            quantize_checkpoint(
                model, Path(directory) / "out", "W8A8", calibration=calib, samples=samples
            )

    found["quantize"] = best_seconds(repeats, quantize)
    for names in dict.fromkeys([tuple(schemes[:1]), tuple(schemes)]):
        found["analyze " + "+".join(names)] = best_seconds(
            repeats, lambda names=names: analyze(model, calib, names, samples=samples)
        )
    return found


def correlations(rows: list[dict[str, Any]], schemes: list[str]) -> Iterator[tuple[str, ...]]:
    """Metric and its correlation over the groups of each scheme, and of all together; how many
    groups there are stands first."""
    names = [*schemes, *(["all"] if len(schemes) > 1 else [])]
    yield (
        "measure",
        *(f"{name}, {sum(name in (r['scheme'], 'all') for r in rows)}" for name in names),
    )
    for metric in [*METRICS, "linear"]:
        cells = []
        for name in names:
            chosen = [row for row in rows if name in (row["scheme"], "all")]
            if all(metric in row["predicted"] for row in chosen):
                values = [row["predicted"][metric] for row in chosen]
                cells.append(f"{spearman(values, [row['measured'] for row in chosen]):.3f}")
            else:
                cells.append("")
        yield metric, *cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--schemes", default="W8A8,W8A8_DYNAMIC,W4A16")
    parser.add_argument("--measured", default="", help="schemes whose loss is measured; all")
    parser.add_argument("--groups", default="*", help="globs of groups, with commas")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=0, help="of the cost; 0 does not measure it")
    parser.add_argument("--probe", type=int, help="tokens of the probe")
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = args.model
        if args.twin:
            model = Path(directory) / "twin"
            runpy.run_path(str(INJECT))["inject"](args.model, model)
        result = run(model, args)
    if args.json:
        write_json(args.json, result)
    rows = result["rows"]
    real = [row for row in rows if row["measured"] > STANDARD_ERRORS * row["measured_error"]]
    for title, chosen in (("all groups", rows), ("those told apart from noise", real)):
        print(f"\n{title}:")
        for cells in correlations(chosen, result["measured"]):
            print("| " + " | ".join(cells) + " |")
    print(json.dumps(result["seconds"]))


def run(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The analysis, what was measured, and the cost."""
    schemes = args.schemes.split(",")
    measured = args.measured.split(",") if args.measured else schemes
    found = analyze(model, args.calib, schemes, samples=args.samples, probe_tokens=args.probe)
    print(f"analysed in {found.seconds} s, probe {found.request['probe']}", flush=True)
    tokens = eval_windows(args.heldout, model, 256, args.windows)
    rows = []
    for scheme in measured:
        globs = [f"model.layers.{glob}" for glob in args.groups.split(",")]
        chosen = [g for g in found.of(scheme) if any(fnmatchcase(g.path, p) for p in globs)]
        losses = increases(model, scheme, chosen, args.calib, tokens, args.samples)
        for group in chosen:
            rows.append(
                {
                    "scheme": scheme,
                    "group": group.path,
                    "measured": losses[group.path][0],
                    "measured_error": losses[group.path][1],
                    "predicted": predictions(found, scheme, group),
                }
            )
    seconds = costs(model, args.calib, schemes, args.samples, args.repeats) if args.repeats else {}
    return {"measured": measured, "probe": found.request["probe"], "rows": rows, "seconds": seconds}


if __name__ == "__main__":
    main()
