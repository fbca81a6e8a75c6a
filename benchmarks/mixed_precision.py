"""What automatic mixed precision saves against other ways to choose.

    python benchmarks/mixed_precision.py fallback MODEL --calib TEXT --heldout TEXT --goal 0.005
        [--scheme W8A8] [--format ascend] [--algorithm minmax] [--decode] [--twin]
    python benchmarks/mixed_precision.py bits MODEL --calib TEXT --heldout TEXT [--twin]
        [--choose W4A16,W8A16] [--group-size 64] [--sizes 5] [--plot FILE.svg]

`fallback` counts the groups that must stay float until perplexity has grown by no more than the
goal, in the order of the analysis' estimate and in that of msModelSlim's measures. `bits` has the
perplexity at some sizes between two schemes: as the allocator chooses, with the first and the last
blocks higher, and at random (mean and spread of several). All choices are put together from linears
that were quantized once, and measured on the same windows, the first of the held-out text; the
analysis looks at its other windows. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ms_quant.allocation.knapsack import best_within
from ms_quant.analysis.records import GroupSensitivity, Sensitivity
from ms_quant.analysis.request import AnalyzeOptions, CheckedAnalysis, prepare_analysis
from ms_quant.analysis.run import run_analysis
from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.comparison import Comparison
from ms_quant.evaluation.perplexity import Measurement, measure
from ms_quant.files.atomic import write_json
from ms_quant.formats.opening import FloatModel
from ms_quant.mixed_precision.assembled import AssembledModel
from ms_quant.mixed_precision.candidates import Candidates, Choice, candidates
from ms_quant.mixed_precision.costs import FLOAT, costs
from ms_quant.mixed_precision.request import EFFORT
from ms_quant.models.names import GroupId
from ms_quant.pipeline.options import QuantizeOptions

INJECT = Path(__file__).parent.parent / "tools" / "inject_outliers.py"
ORDERS = ("loss_increase", "kurtosis", "std", "quantile")
RANDOM = 3


@dataclass(frozen=True)
class Bench:
    """A model whose groups are quantized in each scheme.

    Attributes:
        analysis: the finished analysis, with the linears.
        found: what it says.
        tokens: the held-out windows.
        exact: the float model's losses.
    """

    analysis: CheckedAnalysis
    found: Sensitivity
    tokens: np.ndarray
    exact: Measurement

    def compared(self, choice: Choice, decode: bool = False) -> Comparison:
        """A choice against the float model."""
        model = AssembledModel(self.analysis, choice)
        return Comparison.of(measure(model, self.tokens, decode=decode), self.exact)


def opened(arguments: argparse.Namespace, schemes: Sequence[str], directory: Path) -> Bench:
    """Analyses a model; its job, with the linears, is in a directory."""
    model = arguments.model
    if arguments.twin:
        model = directory / "twin"
        runpy.run_path(str(INJECT))["inject"](arguments.model, model)
    grouped = {"group_size": arguments.group_size} if arguments.group_size is not None else {}
    job = QuantizeOptions(
        model,
        directory / "analysis.json",
        algorithm=arguments.algorithm,
        scheme_options=grouped,
        calib=arguments.calib,
        samples=arguments.samples,
        keep_job=True,
    )
    tokens = eval_windows(arguments.heldout, model, 256)
    tokens, others = tokens[: arguments.windows], tokens[arguments.windows :]
    options = AnalyzeOptions(
        job,
        schemes,
        arguments.format,
        arguments.probe_tokens,
        effort=EFFORT,
        probed=others if len(others) else None,
        keeps_linears=True,
    )
    analysis = prepare_analysis(options)
    found = run_analysis(analysis)
    return Bench(analysis, found, tokens, measure(FloatModel(model), tokens))


def fallback(bench: Bench, scheme: str, goal: float, decode: bool) -> Iterator[dict]:
    """How many groups each order leaves float until the goal is met."""
    known: dict[tuple[str, ...], float] = {}

    def increase(ranked: list[GroupSensitivity], count: int) -> float:
        left = {group.path for group in ranked[:count]}
        key = tuple(sorted(left))
        if key not in known:
            choice = {GroupId(g.block, g.name): FLOAT if g.path in left else scheme for g in ranked}
            known[key] = bench.compared(choice, decode).perplexity_increase
        return known[key]

    for order in ORDERS:
        ranked = bench.found.ranked(scheme, order)
        count = _first(len(ranked) - 1, lambda k, r=ranked: increase(r, k) <= goal)
        yield {
            "order": order,
            "groups": count,
            "increase": increase(ranked, count),
            "with one fewer": increase(ranked, max(0, count - 1)),
        }


def _first(most: int, enough: Callable[[int], bool]) -> int:
    """The least number that is enough, if all above it are."""
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def bits(bench: Bench, schemes: tuple[str, str], sizes: int, seed: int) -> Iterator[dict]:
    """Perplexity at some sizes, for each way to choose."""
    plans = bench.analysis.subject.plans
    known = candidates(bench.found, costs(plans), False, lambda cost: cost.bits)
    low, high = (dict.fromkeys(known.costs, scheme) for scheme in schemes)
    least, most = known.bits(low), known.bits(high)
    for name, choice in (("uniform", low), ("uniform", high)):
        yield _row(bench, known, name, choice)
    for size in np.linspace(least, most, sizes + 2)[1:-1]:
        yield _row(bench, known, "allocated", known.choice(best_within(known.parts, size)))
        yield _row(bench, known, "ends", _greedy(known, schemes, size, _from_ends(known)))
        for k in range(RANDOM):
            order = list(known.costs)
            np.random.default_rng(seed + k).shuffle(order)
            yield _row(bench, known, "random", _greedy(known, schemes, size, order))


def _from_ends(known: Candidates) -> list[GroupId]:
    """The groups of the first and the last blocks before those between."""
    last = max(group.block for group in known.costs)
    return sorted(known.costs, key=lambda group: min(group.block, last - group.block))


def _greedy(
    known: Candidates, schemes: tuple[str, str], size: float, order: Sequence[GroupId]
) -> Choice:
    """The groups of an order get the larger scheme as long as the size allows it."""
    choice = dict.fromkeys(known.costs, schemes[0])
    for group in order:
        larger = {**choice, group: schemes[1]}
        if known.bits(larger) <= size:
            choice = larger
    return choice


def _row(bench: Bench, known: Candidates, name: str, choice: Choice) -> dict:
    compared = bench.compared(choice)
    row = {
        "way": name,
        "bits": known.bits(choice),
        "perplexity": compared.model.perplexity,
        "increase": compared.perplexity_increase,
        "error": compared.perplexity_increase_error,
    }
    print(f"  {name:<10} {row['bits']:.3f} bits {100 * row['increase']:+.3f} %", flush=True)
    return row


def table(rows: list[dict], sizes: int) -> Iterator[str]:
    """Markdown: a line for each size."""
    yield "| bits of a weight | allocated | first and last blocks | random |"
    yield "|---|---|---|---|"
    allocated, ends, randoms = (
        [row for row in rows if row["way"] == way] for way in ("allocated", "ends", "random")
    )
    for k in range(sizes):
        mine, own = allocated[k], randoms[k * RANDOM : (k + 1) * RANDOM]
        found = np.array([100 * row["increase"] for row in own])
        yield (
            f"| {mine['bits']:.2f} | {100 * mine['increase']:+.2f} ± {100 * mine['error']:.2f} % "
            f"| {100 * ends[k]['increase']:+.2f} % "
            f"| {found.mean():+.2f} % ({found.min():+.2f} to {found.max():+.2f}) |"
        )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "ms-quant"
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    marks = {"random": "x", "ends": "s", "uniform": "D", "allocated": "o"}
    for way, mark in marks.items():
        own = sorted((row["bits"], 100 * row["increase"]) for row in rows if row["way"] == way)
        line = "-" if way in ("allocated", "ends") else "none"
        axes.plot(*zip(*own, strict=True), marker=mark, linestyle=line, label=way)
    axes.set_xlabel("bits of a weight, scales and all")
    axes.set_ylabel("perplexity over float, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["fallback", "bits"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--scheme", default="W8A8")
    parser.add_argument("--choose", default="W4A16,W8A16")
    parser.add_argument("--algorithm", default="minmax")
    parser.add_argument("--format", default="")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--goal", type=float, default=0.005)
    parser.add_argument("--sizes", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--probe-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if arguments.what == "fallback":
            bench = opened(arguments, [arguments.scheme], Path(directory))
            found = fallback(bench, arguments.scheme, arguments.goal, arguments.decode)
            rows = []
            for row in found:
                rows.append(row)
                print(row, flush=True)
        else:
            schemes = tuple(arguments.choose.split(","))
            bench = opened(arguments, schemes, Path(directory))
            rows = list(bits(bench, schemes, arguments.sizes, arguments.seed))
            print("\n".join(table(rows, arguments.sizes)))
    if arguments.json:
        write_json(arguments.json, rows)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
