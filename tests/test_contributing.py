"""What CONTRIBUTING.md says is enough for a new scheme or format is enough."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_quant.formats import registry
from ms_quant.formats.golden_stick import format as golden_stick
from ms_quant.formats.opening import open_model
from ms_quant.numerics.linear import int8_linear
from ms_quant.pipeline.run import QuantizeOptions, run_job
from ms_quant.schemes import support, table
from ms_quant.schemes.records import Scheme
from ms_quant.verify.checkpoint import verify_checkpoint

DOCUMENT = Path(__file__).parents[1] / "CONTRIBUTING.md"
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}


def examples(item: str) -> list[str]:
    """The Python of an item of "To add"."""
    text = DOCUMENT.read_text().split(f"* **{item}:**")[1].split("\n* **")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [textwrap.dedent(block) for block in blocks]


def test_a_scheme_is_two_rows(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numerics, held = examples("A scheme")
    scheme = eval(numerics, vars(table))
    assert isinstance(scheme, Scheme)
    for name, row in eval(held, vars(support)).items():
        monkeypatch.setitem(support.SUPPORT, name, row)
    monkeypatch.setitem(table.SCHEMES, scheme.name, scheme)
    model = tiny_model(layers=1, **SHAPE)
    # No runtime serves it, so that it is not asked for by name.
    run_job(QuantizeOptions(model, tmp_path / "out", scheme.name))
    proof = verify_checkpoint(tmp_path / "out", model)
    assert proof.problems == () and proof.quantized == proof.made_again == 7
    assert open_model(tmp_path / "out").format == f"ascend {scheme.name}"


def test_a_format_is_a_record(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = examples("A format")
    names: dict[str, Any] = {**vars(golden_stick), "int8_linear": int8_linear}
    exec("from ms_quant.formats.format import is_there\n" + code, names)
    row = re.search(r"with `(FormatSupport\(.*\))` in the row of (\w+)", DOCUMENT.read_text())
    assert row is not None
    rows = (*support.SUPPORT[row[2]], eval(row[1], vars(support)))
    monkeypatch.setitem(support.SUPPORT, row[2], rows)
    monkeypatch.setitem(registry.FORMATS, "mine", names["FORMAT"])
    model = tiny_model(layers=1, family="qwen2", **SHAPE)
    output = tmp_path / "out"
    run_job(QuantizeOptions(model, output, row[2], formats=("mine",)))
    proof = verify_checkpoint(output, model)
    assert proof.problems == () and proof.quantized == proof.made_again == 7
    written, source = open_model(output), open_model(model)
    assert written.format == f"mine {row[2]}"
    for path in written.plan.quantized():
        weight = source.tensor(f"{path}.weight")
        error = np.abs(written.linear(path).float_weight() - weight)
        # half a step of 1 / 127, and a step that is rounded in float32 at most
        assert error.max() <= np.abs(weight).max() * (0.5 / 127) * (1 + 1e-5)
    said = json.loads((output / "mine.json").read_text())
    assert said["model.layers.0.mlp.up_proj.qweight"] == row[2]
