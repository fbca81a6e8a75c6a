"""vllm-mindspore 0.5.1's own GoldenStickConfig and linears take what is decoded, on a CPU.

Shims: the package's ``__init__``, which needs an NPU; ``ms_custom_ops``, whose kernels are only
called when a linear is run; and the question which device there is. The linears, their
parameters and loading are the runtime's.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import vllm.distributed.parallel_state as state

from ms_quant.errors import MsQuantError
from sparse_compress.layouts.vllm_mindspore import TARGET
from sparse_compress.serve.parameters import flat_description, rank_parameters
from sparse_compress.serve.rank import prove_rank
from sparse_compress.vllm_plugin.loader import load_rank

mindspore = pytest.importorskip("mindspore")
HIDDEN, HEADS, KV_HEADS, DIM, INTER, VOCAB = 384, 12, 4, 64, 768, 2048


def installed() -> Path:
    try:
        listed = files("vllm_mindspore") or []
    except PackageNotFoundError:
        pytest.skip("vllm_mindspore is not installed")
    return next(
        Path(str(file.locate())).parent for file in listed if str(file) == "vllm_mindspore/utils.py"
    )


@pytest.fixture(scope="module")
def linears() -> Any:
    """The runtime's modules."""
    package = ModuleType("vllm_mindspore")
    package.__path__ = [str(installed())]
    package.__spec__ = ModuleSpec("vllm_mindspore", None, is_package=True)
    operators = ModuleType("ms_custom_ops")
    operators.trans_data = operators.quant_batch_matmul = None  # type: ignore[attr-defined]
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "vllm_mindspore", package)
    patch.setitem(sys.modules, "ms_custom_ops", operators)
    import vllm_mindspore.utils

    patch.setattr(vllm_mindspore.utils, "get_ascend_soc_version", lambda: "ascend910b")
    import vllm.model_executor.utils
    from vllm_mindspore.model_executor.utils import set_weight_attrs

    patch.setattr(vllm.model_executor.utils, "set_weight_attrs", set_weight_attrs)
    from vllm_mindspore.model_executor.layers import linear
    from vllm_mindspore.model_executor.layers.quantization.golden_stick import golden_stick
    from vllm_mindspore.platforms.ascend import AscendPlatform

    assert golden_stick  # imported before the platform is one that torch does not compile for
    patch.setattr(vllm.platforms, "current_platform", AscendPlatform())
    yield linear
    patch.undo()


class Group:
    """A tensor-parallel group of two, of which one process is there."""

    world_size = 2

    def __init__(self, rank: int):
        self.rank_in_group = rank
        self.device_group = SimpleNamespace(_name="group")


def build(linear: Any, config: Any) -> Any:
    """The linears of the bundled model as the runtime's Qwen3 makes them."""
    from mindspore import nn

    options = {"bias": False, "params_dtype": mindspore.float16, "quant_config": config}

    class Model(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.names: dict[str, Any] = {}
            for index in range(3):
                layer = f"model.layers.{index}"
                qkv, gate_up = f"{layer}.self_attn.qkv_proj", f"{layer}.mlp.gate_up_proj"
                o, down = f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"
                self.names[qkv] = linear.QKVParallelLinear(
                    HIDDEN, DIM, HEADS, KV_HEADS, prefix=qkv, **options
                )
                self.names[o] = linear.RowParallelLinear(HEADS * DIM, HIDDEN, prefix=o, **options)
                self.names[gate_up] = linear.MergedColumnParallelLinear(
                    HIDDEN, [INTER, INTER], prefix=gate_up, **options
                )
                self.names[down] = linear.RowParallelLinear(INTER, HIDDEN, prefix=down, **options)

        def get_params_dict(self) -> dict[str, Any]:
            found = {}
            for path, cell in self.names.items():
                for name, parameter in cell.parameters_and_names():
                    found[f"{path}.{name}"] = parameter
            for name, shape in FLOATS.items():
                found[name] = self.floats[name] = mindspore.Parameter(
                    mindspore.Tensor(np.zeros(shape, np.float16)), name=name
                )
            return found

        floats: dict[str, Any] = {}  # noqa: RUF012

    return Model()


FLOATS: dict[str, tuple[int, ...]] = {
    "model.norm.weight": (HIDDEN,),
    "model.embed_tokens.weight": (VOCAB // 2, HIDDEN),
    "lm_head.weight": (VOCAB // 2, HIDDEN),
}
for _index in range(3):
    _layer = f"model.layers.{_index}"
    FLOATS |= {f"{_layer}.self_attn.{norm}.weight": (DIM,) for norm in ("q_norm", "k_norm")}
    FLOATS |= {
        f"{_layer}.{norm}.weight": (HIDDEN,)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_the_runtimes_own_linears_take_what_is_decoded(
    checkpoint: Path, linears: Any, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    from mindspore.nn.utils import no_init_parameters
    from vllm_mindspore.model_executor.layers.quantization.golden_stick.a8w8 import (
        A8W8LinearMethod,
    )
    from vllm_mindspore.model_executor.layers.quantization.golden_stick.golden_stick import (
        GoldenStickConfig,
    )

    monkeypatch.setattr(state, "_TP", Group(rank))
    proven = prove_rank(checkpoint, TARGET, rank, 2)
    config = GoldenStickConfig.from_config(flat_description(proven.layout))
    with no_init_parameters():  # as the runtime builds its models
        model = build(linears, config)
    assert all(type(cell.quant_method) is A8W8LinearMethod for cell in model.names.values())
    load_rank(model, checkpoint, rank, 2)
    expected = rank_parameters(proven, decoded=True)
    parameters = {
        f"{path}.{name}": parameter
        for path, cell in model.names.items()
        for name, parameter in cell.parameters_and_names()
    }
    assert {*parameters, *FLOATS} == expected.keys()
    for name, parameter in {**parameters, **model.floats}.items():
        array = expected[name].make()
        assert not parameter.has_init, name  # else it would be filled again when it is used
        found = parameter.asnumpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape), name
        assert found.tobytes() == array.tobytes(), name


def test_the_nested_description_would_leave_every_linear_float(
    checkpoint: Path, linears: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.5.1 takes it without a word; the loader does not take the model that comes of it."""
    from vllm_mindspore.model_executor.layers.quantization.golden_stick.golden_stick import (
        GoldenStickConfig,
    )

    monkeypatch.setattr(state, "_TP", Group(0))
    nested = json.loads((checkpoint / TARGET.description).read_text())
    model = build(linears, GoldenStickConfig.from_config(nested))
    with pytest.raises(MsQuantError, match=r"weight' is int8 \[640, 384\], expected float16"):
        load_rank(model, checkpoint, 0, 2)
