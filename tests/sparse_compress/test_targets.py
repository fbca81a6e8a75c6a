"""Each target's files, description and tensors against golden tables; the same numbers in all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.formats.inspection import inspect_checkpoint
from sparse_compress.cli import app
from sparse_compress.codec import matrix_info
from sparse_compress.layouts import TARGETS, Layout, Target
from sparse_compress.pipeline.estimate import estimate
from sparse_compress.pipeline.info import info
from sparse_compress.pipeline.request import SparseOptions, check
from sparse_compress.pipeline.run import run
from sparse_compress.ranks.reader import SparseModel, open_w8a8sc
from sparse_compress.verify.checkpoint import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "layouts"
LAYER = "model.layers.0"
QKV, DOWN = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.down_proj"
RANK = "model-rank-{}-part-0.safetensors"
Make = Callable[..., Any]


def unchanged(tensors: dict[str, np.ndarray]) -> None:
    pass


@pytest.fixture
def make_for(make: Make) -> Make:
    """``make`` for a target; the model has no padding, which not every target takes."""

    def one(target: str, model: dict[str, Any] | None = None, **options: Any) -> Any:
        keys = {"vocab_size": 320, "change": unchanged, **(model or {})}
        return make(keys, **{"tp": most_ranks(target), "target": target, **options})

    return one


def most_ranks(target: str) -> int:
    return 1 if target == "msmodelslim" else 2


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def opened(directory: Path) -> SparseModel:
    model = open_w8a8sc(directory)
    assert isinstance(model, SparseModel)
    return model


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_files_and_tensors(make_for: Make, target: str) -> None:
    """Names, types and shapes; the length of coded weights, which depends on them, is null."""
    output = make_for(target, exclude=("*.o_proj",)).output
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    found: dict[str, Any] = {}
    for path in paths:
        tensors = load_file(path) if path.suffix == ".safetensors" else {}
        found[path.relative_to(output).as_posix()] = {
            name: [str(array.dtype), None if coded(name, array) else list(array.shape)]
            for name, array in tensors.items()
        }
    assert found == golden(target)["files"]


def coded(name: str, array: np.ndarray) -> bool:
    return array.dtype == np.int8 and name.endswith(".weight")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_description(make_for: Make, target: str) -> None:
    config = opened(make_for(target, exclude=("*.o_proj",)).output).config
    paths = (path for _, _, path in TARGETS[target].linears(config))
    compressed = frozenset(path for path in paths if not path.endswith("o_proj"))
    layout = Layout(config, most_ranks(target), compressed, TARGETS[target])
    value = layout.target.describe(layout, lambda rank, name: 128 * (rank + 1))
    assert value == golden(target)["description"]


@pytest.mark.parametrize("target", ["vllm-ascend", "msmodelslim"])
def test_a_description_without_lengths_is_written_as_it_is(make_for: Make, target: str) -> None:
    output = make_for(target, exclude=("*.o_proj",)).output
    found = json.loads((output / TARGETS[target].description).read_text())
    assert found == golden(target)["description"]


@pytest.mark.parametrize(
    ("target", "tp"),
    [
        *(("vllm-mindspore", 1), ("vllm-mindspore", 2)),
        *(("vllm-ascend", 1), ("vllm-ascend", 2), ("msmodelslim", 1)),
    ],
)
def test_round_trip(make_for: Make, target: str, tp: int) -> None:
    made = make_for(target, tp=tp)
    result = verify(made.output, made.source)
    assert result.problems == ()
    assert result.checked["recomputed"] == 7
    assert (made.summary["target"], made.summary["format"]) == (target, f"W8A8SC TP{tp}")
    found = info(made.output)
    assert len(found["rows"]) == (4 if TARGETS[target].fused else 7) * tp
    assert found["target"] == target
    files = 1 if TARGETS[target].one_file else 2
    assert inspect_checkpoint(made.output)["files"] == files * tp
    assert not list(made.output.glob("rank_*")) or target == "vllm-mindspore"


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"vllm-mindspore"}))
def test_the_numbers_do_not_depend_on_the_target(make_for: Make, target: str) -> None:
    exclude = ("*.o_proj",)
    tp = most_ranks(target)  # the sum over a rank's rows is rounded in an order of its own
    ours = opened(make_for("vllm-mindspore", exclude=exclude, tp=tp).output)
    theirs = opened(make_for(target, exclude=exclude).output)
    x = np.random.default_rng(0).standard_normal((3, 1280), np.float32)
    for member, linear in ours.config.block(0).linears.items():
        channels = linear.in_features
        one, other = (model.linear(f"{LAYER}.{member}") for model in (ours, theirs))
        if one is None:
            assert other is None and member == "self_attn.o_proj"
            continue
        np.testing.assert_array_equal(other.weight, one.weight)
        np.testing.assert_array_equal(other.forward(x[:, :channels]), one.forward(x[:, :channels]))
    for name in ours.layout.float_names():
        np.testing.assert_array_equal(theirs.tensor(name), ours.tensor(name))
    windows = np.random.default_rng(1).integers(0, 300, (2, 16), np.int32)
    one, other = (perplexity(model, windows).perplexity for model in (ours, theirs))
    assert one == other


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_kept_job_is_written_for_another_target(
    make_for: Make, tmp_path: Path, file_contents: Make, target: str
) -> None:
    made = make_for(target)
    job = tmp_path / "job"
    for first in set(TARGETS) - {target}:
        tp = most_ranks(first)
        other = replace(made.options, target=first, tp=tp, output=tmp_path / first)
        run(replace(other, job=job, keep_job=True))
    steps: list[str] = []
    again = replace(made.options, output=tmp_path / "again", job=job)
    run(again, lambda step, part: steps.append(step))
    assert set(steps) == {"compress"}
    assert file_contents(again.output) == file_contents(made.output)


@pytest.mark.parametrize("moment", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_a_rank_file_is_gone_on_with(
    make_for: Make, tmp_path: Path, file_contents: Make, moment: float
) -> None:
    made = make_for("vllm-ascend")
    options = replace(made.options, output=tmp_path / "again")

    def stop(step: str, part: float) -> None:
        if step == "compress" and part >= moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options, stop)
    assert not options.output.exists()
    parts: list[float] = []
    run(options, lambda step, part: parts.append(part))
    assert parts == sorted(parts) and parts[-1] == 1.0
    assert file_contents(options.output) == file_contents(made.output)


def test_a_row_parallel_quant_bias_is_on_the_first_rank(make_for: Make) -> None:
    output = make_for("vllm-ascend").output
    first, second = (load_file(output / RANK.format(rank)) for rank in range(2))
    assert first[f"{DOWN}.quant_bias"].any() and not second[f"{DOWN}.quant_bias"].any()
    np.testing.assert_array_equal(first[f"{QKV}.info"], matrix_info(512, 320))
    np.testing.assert_array_equal(first[f"{DOWN}.info"], [8, 8, 640, 320, 1])


def put(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{QKV}.info", 4), "info' is [4, 8, 320, 512, 1], expected [8, 8, 320, 512, 1]"),
        (put(f"{QKV}.input_scale", 1), "rank_1: " + QKV + ".input_scale: differs from rank_0"),
        (put(f"{DOWN}.input_offset", 77), "rank_1: " + DOWN + ".input_offset: differs from"),
        (put(f"{DOWN}.quant_bias", 1), "rank_1: " + DOWN + ".quant_bias: holds 1 values"),
        (lambda t: t.pop(f"{QKV}.info"), f"{RANK.format(1)}: tensor '{QKV}.info' is missing"),
        (
            lambda t: t.update({f"{QKV}.input_scale": np.ones(320, np.float16)}),
            "found float16 [320], expected float16 [1]",
        ),
    ],
)
def test_defects_of_a_rank_file_are_named(
    make_for: Make, damage: Make, change: Any, message: str
) -> None:
    copy = damage(make_for("vllm-ascend"))
    copy.edit(RANK.format(1), change)
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("version"), "version is None, expected '1.0.0'"),
        (lambda d: d.pop("model.norm.weight"), "model.norm.weight is None, expected 'FLOAT'"),
        (lambda d: d.update({"x.weight": "FLOAT"}), "x.weight is 'FLOAT', expected None"),
        (
            lambda d: d.update({f"{QKV}.input_scale": "W8A8SC"}),
            "qkv_proj.input_scale is 'W8A8SC', expected 'W8A8S'",
        ),
        (
            lambda d: d.update({f"{LAYER}.self_attn.k_proj.weight": "FLOAT"}),
            "k_proj.weight is 'FLOAT', expected 'W8A8SC'",
        ),
    ],
)
def test_defects_of_the_description_are_named(
    make_for: Make, damage: Make, change: Any, message: str
) -> None:
    copy = damage(make_for("vllm-ascend"))
    copy.edit_json("quant_model_description.json", change)
    copy.reseal()
    problems = verify(copy.directory).problems
    assert any(message in problem for problem in problems), problems
    with pytest.raises(MsQuantError) as caught:
        open_w8a8sc(copy.directory)
    assert message in str(caught.value)


def test_a_missing_rank_file_is_refused(make_for: Make, damage: Make) -> None:
    copy = damage(make_for("vllm-ascend"))
    (copy.directory / RANK.format(0)).unlink()
    with pytest.raises(MsQuantError, match=r"has \['model-rank-1-part-0.*expected \['model-rank-0"):
        open_w8a8sc(copy.directory)
    (copy.directory / RANK.format(1)).unlink()
    with pytest.raises(MsQuantError, match=r"has 0 files model-rank-\*, expected 1 to 1024"):
        open_w8a8sc(copy.directory)


def test_a_description_of_another_format_is_left_to_other_readers(tmp_path: Path) -> None:
    text = json.dumps({"model_quant_type": "W8A8", "version": "1.0.0"})
    (tmp_path / "quant_model_description.json").write_text(text)
    assert open_w8a8sc(tmp_path) is None


def test_a_record_of_another_target_is_found(make_for: Make, damage: Make) -> None:
    copy = damage(make_for("vllm-mindspore"))
    copy.edit_json("ms_quant.json", lambda r: r["record"].update(target="vllm-ascend"))
    copy.reseal()
    assert "has [], expected ['model-rank-0-part-0" in verify(copy.directory).problems[0]


def test_an_output_for_another_target_is_refused(make_for: Make) -> None:
    options = replace(make_for("vllm-ascend").options, target="vllm-mindspore")
    message = "made with target = 'vllm-ascend', now target is 'vllm-mindspore'"
    with pytest.raises(MsQuantError, match=message):
        run(options)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"family": "qwen2"},
        {},
        "self_attn.qkv_proj has a bias, and whether the file holds it beside quant_bias is not",
    ),
    ({"family": "llama", "biases": True}, {}, "self_attn.qkv_proj has a bias"),
    ({"tied": True}, {}, "lm_head is tied to the embedding, and how it is stored then is not"),
    ({"padded": True}, {}, "vocab_size is 310, expected a multiple of 64"),
    ({}, {"tp": 4}, "tp is 4, expected a divisor of num_key_value_heads, which is 2"),
    ({}, {"algorithm": "osl"}, "no place for the smoothing of algorithm osl, expected minmax"),
    ({}, {"algorithm": "smoothquant"}, "no place for the smoothing of algorithm smoothquant"),
]


@pytest.mark.parametrize(("model", "changes", "message"), REFUSED)
def test_what_vllm_ascend_does_not_document_is_refused(
    make: Make, tmp_path: Path, model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    keys = {} if model.get("padded") else {"vocab_size": 320, "change": unchanged, **model}
    made = make(keys, tp=2)
    options = replace(made.options, target="vllm-ascend", output=tmp_path / "out", **changes)
    refused(options, message)


def refused(options: SparseOptions, message: str) -> None:
    with pytest.raises(MsQuantError) as caught:
        run(options)
    assert f"target {options.target}" in str(caught.value) and message in str(caught.value)
    assert sorted(options.output.parent.glob(f"{options.output.name}*")) == []


def test_smoothing_is_never_dropped(
    make_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(make_for("vllm-ascend").options, output=tmp_path / "out")
    monkeypatch.setattr(Target, "check", lambda *arguments: None)
    with pytest.raises(MsQuantError, match=r"qkv_proj\.input_scale: differs between channels"):
        run(replace(options, algorithm="smoothquant"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_mindie_is_refused_by_family(make: Make, tmp_path: Path, family: str) -> None:
    made = make({"family": family, "biases": family == "llama"}, tp=2)
    options = replace(made.options, target="mindie", output=tmp_path / "out")
    refused(options, f"family {family}: the names of its packed tensors and the order of")


def test_an_unknown_target_is_refused(make: Make, tmp_path: Path) -> None:
    options = replace(make(tp=2).options, target="x", output=tmp_path / "out")
    with pytest.raises(MsQuantError, match="target 'x' is unknown, expected one of vllm-mindspore"):
        run(options)


def test_the_plan_names_the_target_and_its_room(make_for: Make, tmp_path: Path) -> None:
    options = replace(make_for("vllm-ascend").options, output=tmp_path / "out")
    plan = estimate(check(options))
    assert plan["target"] == "vllm-ascend"
    assert "--load-format sharded_state" in plan["served_by"][0]
    other = estimate(check(replace(options, target="vllm-mindspore")))
    # The blocks of one rank are kept beside its file until it is whole.
    assert plan["disk_bytes"] > other["disk_bytes"] + 500_000


def test_the_command_takes_a_target(make_for: Make, tmp_path: Path) -> None:
    options = make_for("vllm-ascend").options
    named = ["run", options.model, "-o", tmp_path / "out", "--calib", options.calib, "--dry-run"]
    arguments = [*map(str, named), "--samples=4", "--seq-len=32", "--json", "--target"]
    done = CliRunner().invoke(app, [*arguments, "vllm-ascend"])
    assert json.loads(done.stdout)["target"] == "vllm-ascend"
    done = CliRunner().invoke(app, [*arguments, "mindie"])
    assert isinstance(done.exception, MsQuantError)


def test_families_that_vllm_ascend_does_not_document_are_named(make_for: Make) -> None:
    made = make_for("vllm-ascend", {"family": "llama"})
    assert verify(made.output, made.source).problems == ()
    sentence = "vllm-ascend documents W8A8SC only for qwen3, not llama"
    assert made.summary["not_served_by"] == [sentence]
