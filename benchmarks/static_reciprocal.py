"""Held-out perplexity of static W8A8 as vllm-ascend computes it, and as it would by dividing.

    python benchmarks/static_reciprocal.py MODEL --calib TEXT --heldout TEXT [--windows 64]

That runtime multiplies inputs by 1 / input_scale, rounded to the model's type. MODEL and its
outlier twin (tools/inject_outliers.py) are quantized with the first scale that holds the range, and
divided by it, and multiplied as the runtime does; then as ``ms-quant quantize`` does it, with the
first scale whose rounded reciprocal is nearly exact, and multiplied.
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ms_quant import kernels
from ms_quant.data.calibration import eval_windows
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.opening import JobModel
from ms_quant.numerics import activation, storage
from ms_quant.numerics.linear import QuantizedLinear
from ms_quant.pipeline.request import QuantizeOptions, prepare
from ms_quant.pipeline.run import run_blocks

INJECT = Path(__file__).parent.parent / "tools" / "inject_outliers.py"
ALGORITHMS = ("minmax", "histogram", "smoothquant")


class Dividing(JobModel):
    """The same numbers in a runtime that divides."""

    def linear(self, path: str) -> QuantizedLinear | None:
        linear = super().linear(path)
        if linear is None:
            return None
        return replace(linear, activation=replace(linear.static, multiplied_in=None))


@contextmanager
def first_scale() -> Iterator[None]:
    """Takes the first scale, whatever its reciprocal."""
    chosen = activation.round_up_for_reciprocal
    activation.round_up_for_reciprocal = storage.round_up  # type: ignore[assignment]
    try:
        yield
    finally:
        activation.round_up_for_reciprocal = chosen


def measure(
    kinds: Sequence[type[JobModel]], model: Path, algorithm: str, calib: Path, tokens: np.ndarray
) -> list[float]:
    """Perplexity of one quantized model in some arithmetics."""
    with tempfile.TemporaryDirectory() as directory:
        options = QuantizeOptions(
            model, Path(directory) / "out", "W8A8", algorithm, formats=("ascend",), calib=calib
        )
        checked = prepare(options)
        job = checked.job()
        with job.open():
            run_blocks(checked, job, lambda index, part: None)
            served = [kind(checked.plan, job, checked.tensors) for kind in kinds]
            found = [perplexity(kind, tokens).perplexity for kind in served]
            job.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    tokens = eval_windows(arguments.heldout, arguments.model, 256)[: arguments.windows]
    kernel = kernels.best_isa() if kernels.available() else "NumPy"
    print(f"{tokens[:, 1:].size} held-out tokens, {kernel}\n")
    print("| algorithms | model | first scale, divided | first scale, multiplied | as written |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        twin = Path(directory) / "twin"
        runpy.run_path(str(INJECT))["inject"](arguments.model, twin)
        for algorithm in ALGORITHMS:
            for name, model in (("model", arguments.model), ("twin", twin)):
                run = (model, algorithm, arguments.calib, tokens)
                with first_scale():
                    found = measure((Dividing, JobModel), *run)
                found += measure((JobModel,), *run)
                cells = " | ".join(f"{value:.3f}" for value in found)
                print(f"| {algorithm} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
