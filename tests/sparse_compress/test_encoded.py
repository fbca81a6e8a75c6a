"""`sparse-compress run` on a model in FP8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from encoded import maker

from ms_quant.pipeline.convert import convert_checkpoint
from sparse_compress.pipeline.run import run
from sparse_compress.verify.checkpoint import verify


def test_ranks_are_those_of_the_float_model(make: Callable[..., Any], tmp_path: Path) -> None:
    """Products with powers of two are exact in bfloat16, so that the copy is the same model."""
    source, copy = tmp_path / "fp8", tmp_path / "copy"
    made = make()
    maker.make_fp8_source(made.source, source, maker.Options(powers=True, apart=True))
    convert_checkpoint(source, copy, "float")
    ranks = []
    for model in (source, copy):
        options = replace(made.options, model=model, output=tmp_path / f"{model.name}-out")
        run(options)
        assert verify(options.output, model).problems == ()
        files = sorted(options.output.glob("rank_*/*.safetensors"))
        ranks.append([path.read_bytes() for path in files])
    assert len(ranks[0]) > 1 and ranks[0] == ranks[1]
