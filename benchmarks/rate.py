"""Perplexity against stored bytes: five ways to make a W8A8S checkpoint, five sizes each.

    python benchmarks/rate.py MODEL --calib TEXT --heldout TEXT [--windows 286] [--plot FILE.svg]

Each way rounds the same linears from the same calibration data; activations are quantized alike
(static, min-max). Stored bytes are those of the coded linears, tiles and index, over the number of
their weights. The last tables say how many bytes rate-distortion rounding saves at the perplexity
of each point of the others. The plot needs matplotlib.

    magnitude   the smallest weights of the matrix pruned, then absmax / 127
    activation  |W| * ||X|| (arXiv 2306.11695), then absmax / 127
    sparsegpt   pruned by w^2 / U_jj^2 within 128 columns and compensated (arXiv 2301.00774)
    low-bit     the rule of existing W8A8S checkpoints: the largest |w| of each row but a share of
                outliers becomes 7, outliers stay on the same step, up to 127
    rate        sparse-compress run --target-ratio
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ms_quant.algorithms.gptq import BLOCK
from ms_quant.algorithms.problem import Problem, Solution
from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.opening import FloatModel, JobModel, ServedModel
from ms_quant.job.directory import JobDirectory
from ms_quant.numerics.affine import per_channel_scale
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.request import CheckedJob
from ms_quant.pipeline.run import run_blocks
from ms_quant.quantization.hooks import BlockHooks, Rounding
from sparse_compress.codec import compress_matrix
from sparse_compress.pipeline.request import SparseOptions, check
from sparse_compress.rate.goal import Goal
from sparse_compress.rate.prune import pruning_transform
from sparse_compress.rate.rounding import Rounded, curvature
from sparse_compress.rate.search import Search
from sparse_compress.rate.steps import make_subject

PRUNED = (0.2, 0.35, 0.5, 0.6, 0.7)
OUTLIERS = (0.0001, 0.01, 0.03, 0.07, 0.15)
RATIOS = (0.30, 0.35, 0.40, 0.45, 0.55)
LABELS = {
    "magnitude": "magnitude pruning + RTN",
    "activation": "activation-aware pruning + RTN",
    "sparsegpt": "SparseGPT + GPTQ, 8 bits",
    "low-bit": "low-bit rule",
    "rate": "rate-distortion (ours)",
}
GOALS = {"low-bit": 0.15, "magnitude": 0.45, "activation": 0.45, "sparsegpt": 0.45}
Point = dict[str, Any]


def per_group(round_matrix: Callable[[np.ndarray, np.ndarray], Rounded]) -> Rounding:
    """A rounding from a function of the smoothed weight and the Hessian."""

    def rounding(
        problem: Problem, solution: Solution
    ) -> tuple[dict[str, QuantizedLinear], dict[str, Any]]:
        subject = make_subject(problem, solution)
        return subject.split(problem, round_matrix(subject.weight, subject.hessian)), {}

    return rounding


def low_bit(outliers: float, weight: np.ndarray, hessian: np.ndarray) -> Rounded:
    count = round(outliers * weight.shape[1])
    largest = np.sort(np.abs(weight), axis=1)[:, -1 - count]
    scale = (largest / 7).astype(np.float32)
    return Rounded(np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale)


def sparsegpt(sparsity: float, weight: np.ndarray, hessian: np.ndarray) -> Rounded:
    factor, scale = curvature(hessian).factor, per_channel_scale(weight)[:, 0]
    weight, codes = weight.copy(), np.empty(weight.shape, np.int8)
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        score = np.square(weight[:, start:stop] / np.diagonal(factor)[start:stop])
        keep = score > np.sort(score, axis=None)[int(sparsity * score.size) - 1]
        errors = np.empty((len(weight), stop - start), np.float32)
        for j in range(start, stop):
            steps = np.where(keep[:, j - start], np.rint(weight[:, j] / scale), 0)
            codes[:, j] = np.clip(steps, -127, 127)
            errors[:, j - start] = (weight[:, j] - codes[:, j] * scale) / factor[j, j]
            weight[:, j + 1 : stop] -= np.outer(errors[:, j - start], factor[j, j + 1 : stop])
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return Rounded(codes, scale)


def ways(checked: CheckedJob) -> Iterable[tuple[str, float, BlockHooks]]:
    for share in PRUNED:
        yield "magnitude", share, BlockHooks(pruning_transform(share, "magnitude"))
    for share in PRUNED:
        yield "activation", share, BlockHooks(pruning_transform(share, "activation"))
    for share in PRUNED:
        yield "sparsegpt", share, BlockHooks(rounding=per_group(partial(sparsegpt, share)))
    for share in OUTLIERS:
        yield "low-bit", share, BlockHooks(rounding=per_group(partial(low_bit, share)))
    for ratio in RATIOS:
        found = Search(checked, Goal(ratio), lambda step, part: None).find()
        yield "rate", ratio, found.hooks


def measure_way(
    checked: CheckedJob, way: str, setting: float, steps: BlockHooks, tokens: np.ndarray
) -> Point:
    directory = checked.options.job_directory.with_name(f"{way}-{setting}")
    record = {**checked.record, "way": way, "setting": setting}
    job = replace(checked, options=replace(checked.options, job=directory), record=record).job()
    with job.open():
        run_blocks(checked, job, lambda index, part: None, steps)
        raw, stored = sizes(checked, job)
        loss = mean_loss(JobModel(checked.plan, job, checked.tensors), tokens)
        job.remove()
    return {"way": way, "setting": setting, "ratio": stored / raw, "loss": loss}


def sizes(checked: CheckedJob, job: JobDirectory) -> tuple[int, int]:
    """Weights and stored bytes of the linears, fused as the runtimes fuse them."""
    raw = stored = 0
    for index in range(checked.plan.config.num_layers):
        for group in checked.plan.groups(index):
            parts = [job.linear(index, member).weight for member in group.members]
            coded = compress_matrix(np.concatenate(parts))
            raw += sum(part.size for part in parts)
            stored += coded.weight.size + coded.index.size
    return raw, stored


def mean_loss(model: ServedModel, tokens: np.ndarray) -> float:
    return float(perplexity(model, tokens).loss)


def increase(point: Point, before: float) -> float:
    return math.expm1(point["loss"] - before)


def ratio_at(ours: list[Point], loss: float) -> float | None:
    """The ratio of our curve at a loss, between two of its points; None outside of it."""
    losses = [point["loss"] for point in ours]
    if not min(losses) <= loss <= max(losses):
        return None
    order = np.argsort(losses)
    return float(np.interp(loss, np.array(losses)[order], [ours[i]["ratio"] for i in order]))


def report(points: list[Point], before: float) -> list[str]:
    ours = [point for point in points if point["way"] == "rate"]
    lines = [
        "| way | setting | stored / raw | perplexity | vs float | ours there | saves |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        at = None if point["way"] == "rate" else ratio_at(ours, point["loss"])
        saves = "" if at is None else f"{100 * (1 - at / point['ratio']):.1f} %"
        lines.append(
            f"| {LABELS[point['way']]} | {point['setting']:g} | {point['ratio']:.4f} "
            f"| {math.exp(point['loss']):.4f} | {100 * increase(point, before):+.2f} % "
            f"| {'' if at is None else f'{at:.4f}'} | {saves} |"
        )
    return lines


def misses(points: list[Point]) -> list[str]:
    """Points at whose perplexity the goal is not reached."""
    ours, found = [point for point in points if point["way"] == "rate"], []
    for point in points:
        at = ratio_at(ours, point["loss"]) if point["way"] in GOALS else None
        if at is not None and at > (1 - GOALS[point["way"]]) * point["ratio"]:
            found.append(f"{point['way']} {point['setting']:g}: {at:.4f} of {point['ratio']:.4f}")
    return found


def plot(points: list[Point], before: float, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "rate"
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for way, label in LABELS.items():
        found = sorted((p["ratio"], 100 * increase(p, before)) for p in points if p["way"] == way)
        axes.plot(
            *zip(*found, strict=True), marker="o", label=label, lw=2.5 if way == "rate" else 1.2
        )
    axes.set(yscale="log", xlabel="stored bytes of a weight", ylabel="perplexity above float, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=286)
    parser.add_argument("--plot", type=Path)
    parser.add_argument(
        "--json", type=Path, default=Path("rate.json"), help="points; those it has are kept"
    )
    arguments = parser.parse_args()
    tokens = eval_windows(arguments.heldout, arguments.model, 256, arguments.windows)
    with tempfile.TemporaryDirectory() as directory:
        options = SparseOptions(
            arguments.model, Path(directory) / "out", arguments.calib, tp=1, target_ratio=RATIOS[0]
        )
        checked = check(options).quantization
        before = mean_loss(FloatModel(arguments.model), tokens)
        kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        points = kept.get("points", []) if kept.get("float_loss") == before else []
        for way, setting, steps in ways(checked):
            if not any((p["way"], p["setting"]) == (way, setting) for p in points):
                points.append(measure_way(checked, way, setting, steps, tokens))
                print(points[-1], flush=True)
                arguments.json.write_text(json.dumps({"float_loss": before, "points": points}))
    print(f"\n{tokens[:, 1:].size} held-out tokens, float perplexity {math.exp(before):.4f}\n")
    print("\n".join(report(points, before)))
    if arguments.plot:
        plot(points, before, arguments.plot)
    if missed := misses(points):
        raise SystemExit("the goal is missed at " + "; ".join(missed))


if __name__ == "__main__":
    main()
