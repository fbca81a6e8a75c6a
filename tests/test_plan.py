"""What will be quantized, and the choices that are refused before any work."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ms_quant.algorithms import ALGORITHMS
from ms_quant.errors import MsQuantError
from ms_quant.formats.checks import not_served_by, served_by
from ms_quant.models.config import parse_config
from ms_quant.numerics.storage import DTYPES
from ms_quant.pipeline.planning import make_plan
from ms_quant.plan.plan import Plan
from ms_quant.schemes.support import SUPPORT
from ms_quant.schemes.table import SCHEMES

BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = parse_config(
    {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    },
    "dir/config.json",
)
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
MEMBERS = QKV + ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def plan(scheme="W8A8", algorithm="minmax", **options) -> Plan:
    return make_plan(CONFIG, scheme, algorithm, dtype=BF16, **options)


def paths(*blocks: int, without: tuple[str, ...] = ()) -> list[str]:
    return [f"model.layers.{i}.{m}" for i in blocks for m in MEMBERS if m not in without]


def test_everything_is_quantized_in_model_order():
    assert plan().quantized() == paths(0, 1)
    assert plan().float_linears() == []


@pytest.mark.parametrize(
    ("exclude", "float_groups", "floats"),
    [
        # one member takes its fused group with it
        (["model.layers.0.self_attn.k_proj"], ["model.layers.0.qkv"], [(0, tuple(QKV))]),
        (
            ["*.up_proj"],
            ["model.layers.0.gate_up", "model.layers.1.gate_up"],
            [(0, ("mlp.gate_proj", "mlp.up_proj")), (1, ("mlp.gate_proj", "mlp.up_proj"))],
        ),
        (["*.1.*down_proj"], ["model.layers.1.down"], [(1, ("mlp.down_proj",))]),
        (
            ["model.layers.1.*"],
            [f"model.layers.1.{name}" for name in ("qkv", "o", "gate_up", "down")],
            [(1, tuple(MEMBERS))],
        ),
        # two patterns in one group, and both count as matched
        (["*.0.*.v_proj", "*.0.*.q_proj"], ["model.layers.0.qkv"], [(0, tuple(QKV))]),
        (
            ["*.0.*.o_proj", "*.0.*.q_proj"],  # two patterns, one block
            ["model.layers.0.o", "model.layers.0.qkv"],
            [(0, (*QKV, "self_attn.o_proj"))],
        ),
    ],
)
def test_exclude_takes_whole_groups(exclude, float_groups, floats):
    found = plan(exclude=exclude)
    left = [str(group) for group, layer in found.layers.items() if layer is None]
    assert sorted(left) == sorted(float_groups)
    expected = [f"model.layers.{i}.{member}" for i, members in floats for member in members]
    assert found.float_linears() == expected
    assert sorted(found.quantized() + expected) == sorted(paths(0, 1))
    for index in (0, 1):
        members = [m for group in found.groups(index) for m in group.members]
        assert [f"model.layers.{index}.{m}" for m in members] == [
            path for path in found.quantized() if path.startswith(f"model.layers.{index}.")
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "W4A4"}, r"^scheme 'W4A4' is unknown, expected one of W8A8, W8A8_DYNAMIC, "),
        ({"scheme": "w8a8"}, r"^scheme 'w8a8' is unknown"),
        ({"algorithm": "magic"}, r"^algorithm 'magic' is unknown, expected one of minmax, "),
        (
            {"scheme": "W8A16", "algorithm": "osl"},
            r"^algorithm 'osl' does not work with scheme W8A16: .* expected one of minmax, ",
        ),
        ({"algorithm": "svd"}, r"^algorithm 'svd' does not work with scheme W8A8: its tensors"),
        ({"algorithm": "osl+smoothquant"}, r"'osl\+smoothquant': osl and smoothquant both decide"),
        ({"algorithm": "gptq+gptq"}, r"gptq and gptq both decide the rounding, expected one$"),
        ({"algorithm": "osl+"}, r"^algorithm '' is unknown"),
        ({"exclude": ["*"]}, r"every linear stays float, nothing is left to quantize$"),
        ({"exclude": ["*.w1"]}, r"^exclude pattern '\*\.w1' matches no linear"),
        ({"exclude": ["model.layers.2.*"]}, r"^exclude pattern 'model\.layers\.2\.\*'"),
        ({"exclude": ["*.o_proj", "*.O_PROJ"]}, r"^exclude pattern '\*\.O_PROJ'"),
        ({"exclude": ["lm_haed"]}, r"^exclude pattern 'lm_haed'"),
        ({"exclude": [""]}, r"^exclude pattern ''"),
    ],
)
def test_refused(options, message):
    with pytest.raises(MsQuantError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("scheme", "choices", "message"),
    [
        ("W8A8", {"format": "gguf"}, r"^format 'gguf' is unknown, expected one of golden-stick, "),
        (
            "W8A8",
            {"smoothing_target": "bias"},
            r"^smoothing target 'bias' is unknown, expected one of input-scale, norm",
        ),
        ("W4A16", {"format": "golden-stick"}, r"^scheme W4A16: no golden-stick checkpoint can ho"),
        ("W4A4_MXFP4_SVD", {"format": "ascend"}, r"served by no runtime .* expected no --format$"),
        (
            "W8A8",
            {"format": "ascend", "smoothing_target": "input-scale"},
            r"^smoothing target input-scale: ascend checkpoints of scheme W8A8 .* expected norm$",
        ),
        (
            "W8A8_DYNAMIC",
            {"smoothing_target": "mul-scale"},
            r"^smoothing target mul-scale: golden-stick checkpoints of",
        ),
        (
            "W8A16",
            {"format": "ascend", "scheme_options": {"group_size": 64}},
            r"^scheme W8A16: ascend checkpoints hold it only with group_size 0$",
        ),
        (
            "W4A4_MXFP4_DUALSCALE",
            {"scheme_options": {"dual_block_size": 32}},
            r"^scheme W4A4_MXFP4_DUALSCALE: mindie-sd checkpoints hold it only with dual_bl",
        ),
    ],
)
def test_places_that_nothing_serves(scheme, choices, message):
    with pytest.raises(MsQuantError, match=message):
        plan(scheme, **choices)


def test_a_smoothing_target_of_nothing_is_refused():
    with pytest.raises(
        MsQuantError, match=r"^smoothing target norm: no algorithm smooths, expected no"
    ):
        plan(smoothing_target="norm")


def test_formats_of_a_scheme():
    usual, chosen = plan(), plan(format="ascend")
    assert usual.format == "golden-stick" and not {"format", "fold"} & usual.record().keys()
    assert chosen.format == "ascend" and chosen.record()["format"] == "ascend"
    activation = chosen.distinct[0].scheme.activation
    assert activation.folds_bias and not activation.per_channel
    folded = plan(algorithm="smoothquant", smoothing_target="norm")
    assert folded.record()["fold"] == "norm"
    assert not folded.distinct[0].scheme.activation.per_channel
    half = DTYPES["float16"]
    for format, scales in (("ascend", "float16"), ("", "float32")):
        (layer,) = make_plan(CONFIG, "W8A8_DYNAMIC", "minmax", dtype=half, format=format).distinct
        assert layer.storage.scale_dtype == DTYPES[scales]


@pytest.mark.parametrize("alpha", [0.0, 0.5, "1.0"])
def test_alpha_bounds_are_included(alpha):
    made = plan(algorithm="smoothquant", algorithm_options={"alpha": alpha})
    assert made.distinct[0].algorithms.chosen == {"smoothquant": {"alpha": float(alpha)}}


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        ("smoothquant", {"alpha": -0.1}, r"^smoothquant\.alpha is -0\.1: .* equal to 0$"),
        ("smoothquant", {"alpha": 1.01}, r"^smoothquant\.alpha is 1\.01"),
        ("smoothquant", {"alpha": float("nan")}, r"^smoothquant\.alpha is nan"),
        ("smoothquant", {"alpha": "much"}, r"^smoothquant\.alpha is 'much'"),
        ("osl", {"alpha": 0.5}, r"^algorithm osl takes no option 'alpha', expected none$"),
        ("gptq", {"act_order": "maybe"}, r"^gptq\.act_order is 'maybe': .* valid boolean"),
        ("gptq", {"awq.clip": True}, r"takes no option 'awq\.clip', expected gptq\.damping, gptq"),
    ],
)
def test_options_are_refused_by_name(algorithm, settings, message):
    with pytest.raises(MsQuantError, match=message):
        plan(algorithm=algorithm, algorithm_options=settings)


def test_algorithms_are_done_in_the_order_of_their_stages():
    assert plan(algorithm="gptq+osl").algorithm == "osl+gptq"
    assert plan("W4A4_MXFP4_SVD", "gptq").algorithm == "svd+gptq"


def test_groups_that_do_not_divide_the_inputs():
    undivided = {"scheme_options": {"group_size": 128}, "float_undivided": True}
    message = (
        r"^model\.layers\.0\.self_attn\.q_proj\.weight: groups of 128 do not divide K = 64; "
        r"expected another group size, or --float-undivided"
    )
    with pytest.raises(MsQuantError, match=message):
        plan("W4A16", scheme_options={"group_size": 128})
    made = plan("W4A16", **undivided)
    assert {path.rpartition(".")[2] for path in made.quantized()} == {"down_proj"}
    assert plan("W4A16", scheme_options={"group_size": 64}).float_linears() == []


def test_a_scheme_of_networks_is_refused():
    message = (
        r"^scheme W8A8_TIMESTEP: is for networks and not for checkpoints of decoders, use "
        r'ms_quant\.quantize\(network, "W8A8_TIMESTEP", \.\.\.\)$'
    )
    with pytest.raises(MsQuantError, match=message):
        plan("W8A8_TIMESTEP")


def test_every_pair_is_either_planned_or_refused():
    for scheme in SUPPORT:
        for algorithm, row in ALGORITHMS.items():
            if row.suits(SCHEMES[scheme]):
                with pytest.raises(MsQuantError, match=r"does not work with scheme"):
                    plan(scheme, algorithm)
            else:
                chosen = {"group_size": 64} if scheme == "W4A16" else {}
                options = {"scheme_options": chosen, "float_undivided": scheme == "W8A8FP8_BLOCK"}
                assert algorithm in plan(scheme, algorithm, **options).algorithm


def test_options_that_two_algorithms_take_are_told_apart():
    scheme, chosen = "W4A4_FLATQUANT_DYNAMIC", {"steps": 5}
    with pytest.raises(MsQuantError, match=r"expected flatquant\.steps or ssz\.steps once$"):
        plan(scheme, "ssz", algorithm_options=chosen)
    made = plan(scheme, "ssz", algorithm_options={"ssz.steps": 5})
    options = made.distinct[0].algorithms.options
    assert options["ssz"].steps == 5 and options["flatquant"].steps != 5
    twice = {"algorithm_options": {"alpha": 0.5, "smoothquant.alpha": 0.6}}
    with pytest.raises(MsQuantError, match=r"given twice, expected smoothquant\.alpha once$"):
        plan(algorithm="smoothquant", **twice)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"learning_rate": "nan"}, {"batch_rows": 0}])
def test_flatquant_options_are_refused_before_work(settings):
    with pytest.raises(MsQuantError, match=r"^flatquant\."):
        plan("W4A4_FLATQUANT_DYNAMIC", algorithm_options=settings)


def test_a_transform_that_no_factors_have_is_refused_by_name():
    config = parse_config({**CONFIG.raw, "intermediate_size": 100}, "dir/config.json")
    message = r"mlp\.down_proj\.weight: 100 inputs, expected a multiple of 8"
    with pytest.raises(MsQuantError, match=message):
        make_plan(config, "W4A4_FLATQUANT_DYNAMIC", "minmax", dtype=BF16)


def test_a_plan_that_its_runtime_fails_on_says_so():
    """Only a format that is asked for by name must be served."""
    made = plan("W4A4_MXFP4_DUALSCALE")
    assert served_by(made) == []
    (reason,) = not_served_by(made)
    assert reason.startswith("model.layers.0.self_attn.q_proj: MindIE-SD fails on a W4A4_MXFP4_DU")
    for scheme in ("W4A4_MXFP4_DUALSCALE", "W8A8_MXFP8"):
        with pytest.raises(MsQuantError, match=r"q_proj: MindIE-SD fails .*--float-undivided"):
            plan(scheme, format="mindie-sd")
    raw = {**CONFIG.raw, "model_type": "llama", "attention_bias": True, "mlp_bias": True}
    config = parse_config(raw, "dir/config.json")
    for scheme in ("W4A4_MXFP4_DUALSCALE", "W8A8_MXFP8"):
        made = make_plan(config, scheme, "minmax", dtype=BF16, format="mindie-sd")
        assert served_by(made) == ["MindIE-SD quantize()"] and not_served_by(made) == []
