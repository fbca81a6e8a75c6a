"""The environment variable that leaves the slower instruction sets only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ms_quant.kernels import ISAS, available, has_isa

HERE = [name for name in ISAS if available() and has_isa(name)]
SHOWN = """
import numpy as np
from ms_quant import kernels
from ms_quant.errors import MsQuantError
from ms_quant.numerics.linear import quantize_linear
print(kernels.best_isa(), *(name for name in kernels.ISAS if kernels.has_isa(name)))
linear = quantize_linear(np.eye(16, dtype="f4"), None, None, np.dtype("f4"))
packed = kernels.pack(linear)
x = np.linspace(-1, 1, 16 * 200, dtype="f4").reshape(200, 16)
assert np.array_equal(packed(x), linear.forward(x))
for name in list(kernels.ISAS)[kernels.ISAS[kernels.best_isa()] + 1 :]:
    weights = packed.weights.copy()
    weights[4] = kernels.ISAS[name]  # as if packed where nothing was masked
    for attempt in (
        lambda: kernels.pack(linear, name),
        lambda: kernels.PackedLinear(16, weights, packed.params)(x),
    ):
        try:
            attempt()
        except MsQuantError as error:
            assert "instruction set" in str(error), error
        else:
            raise AssertionError(name)
assert not kernels.has_product() or kernels.best_isa() == "amx"
"""
NUMPY = """
import numpy as np
from ms_quant import kernels
from ms_quant.numerics.linear import quantize_linear
linear = quantize_linear(np.eye(16, dtype="f4"), None, None, np.dtype("f4"))
assert kernels.pack(linear) is None
print(kernels.available(), kernels.note())
"""
ROOT = Path(__file__).parents[2]
EVALUATED = f"""
import sys
from ms_quant.cli.main import main
sys.argv[1:] = ["eval", "{ROOT}/models/stdlib-qwen3-6m", "--text", "{ROOT}/README.md"]
main()
"""


def python(script: str, fastest: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MS_QUANT_ISA": fastest},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("fastest", HERE)
def test_instruction_sets_above_one_are_masked(fastest: str) -> None:
    done = python(SHOWN, fastest)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [fastest, *HERE[: HERE.index(fastest) + 1]]


def test_none_leaves_numpy_alone() -> None:
    assert python(NUMPY, "none").stdout.split(maxsplit=1) == [
        "False",
        "MS_QUANT_ISA is none; using the NumPy reference, slower\n",
    ]


@pytest.mark.skipif(not HERE, reason="no native kernels")
@pytest.mark.parametrize("fastest", ["avx1024", "AVX2", "neon_i8mm"])
def test_what_this_machine_has_not_is_refused(fastest: str) -> None:
    if fastest in HERE:
        pytest.skip("this machine has it")
    done = python(EVALUATED, fastest)
    assert done.returncode == 1
    sentence = f"error: MS_QUANT_ISA is {fastest!r}, which is not here, expected one of scalar, "
    assert " ".join(done.stderr.split()).startswith(sentence)
