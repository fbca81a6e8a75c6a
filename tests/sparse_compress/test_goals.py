"""Runs for a size and for a quality, the whole way on tiny models: results, proofs, resuming.

Measuring takes fewer samples here and, but where sizes are compared, fewer prices.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ms_quant.errors import MsQuantError
from ms_quant.evaluation.generation import Generator
from ms_quant.evaluation.perplexity import perplexity
from ms_quant.files.safetensors_file import open_file
from ms_quant.formats.opening import ServedModel, open_model
from sparse_compress.cli import app
from sparse_compress.codec import compress_matrix, decompress_matrix, matrix_info
from sparse_compress.pipeline.info import info
from sparse_compress.pipeline.request import SparseOptions, check
from sparse_compress.pipeline.run import run
from sparse_compress.ranks.reader import open_w8a8sc
from sparse_compress.rate import levels, search, share, steps
from sparse_compress.verify.checkpoint import verify

LAYER = "model.layers.0"
GATE_UP = f"{LAYER}.mlp.gate_up_proj"
BLOCK = "model-00001-of-00002.safetensors"
PROOF = "proof/block-00000.proof"
EXCLUDE = ("*.o_proj", "*.down_proj")  # their 320 rows do not fill tiles, and padding takes space
LENGTH = 32
Make = Callable[..., Any]
Files = Callable[[Path], dict[str, bytes]]


def quieten(tensors: dict[str, np.ndarray]) -> None:
    """Logits as small as a real model's."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:310]
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = (head.astype(np.float32) / 4).astype(head.dtype)


MODEL = {"intermediate_size": 640, "change": quieten}
OPTIONS = {"exclude": EXCLUDE, "samples": 8, "tp": 1}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "SAMPLES", 4096)
        yield


@pytest.fixture
def few_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    few = share.PRICES[::3] + share.PRICES[-1:]
    monkeypatch.setattr(share, "PRICES", few)
    monkeypatch.setattr(steps, "PRICES", few)


@pytest.fixture
def half(make: Make, few_prices: None) -> Any:
    """Made for a ratio of 0.5."""
    return make(MODEL, target_ratio=0.5, **OPTIONS)


@pytest.fixture(scope="session")
def texts() -> dict[Path, Path]:
    return {}


@pytest.fixture
def heldout(half: Any, texts: dict[Path, Path]) -> Path:
    """What the float model itself says, so that a worse model does worse on it."""
    if half.source not in texts:
        generator, rows = Generator(open_model(half.source)), []
        for first in np.random.default_rng(0).permutation(300).tolist():
            tokens = [first, *generator.generate(np.array([first]), LENGTH - 1)]
            rows += [tokens] if len(tokens) == LENGTH else []
            if len(rows) == 6:
                break
        texts[half.source] = half.source.parent / "heldout.npz"
        np.savez(texts[half.source], tokens=np.array(rows, np.int32))
    return texts[half.source]


@pytest.fixture
def lossy(half: Any, heldout: Path, tmp_path: Path) -> SparseOptions:
    """A request for a loss of quality, of one fused linear."""
    options = replace(half.options, output=tmp_path / "out", exclude=(*EXCLUDE, "*.q_proj"))
    return replace(options, target_ratio=None, max_ppl_increase=1.0, heldout=heldout)


def test_what_heldout_records_hold_beyond_the_text_is_said(lossy: SparseOptions) -> None:
    path = lossy.output.with_name("heldout.jsonl")
    assert lossy.heldout is not None
    ids = np.load(lossy.heldout)["tokens"].tolist()
    path.write_text("\n".join(json.dumps({"input_ids": row, "labels": row}) for row in ids))
    notes = check(replace(lossy, heldout=path)).quantization.notes
    (said,) = [line for line in notes if "labels" in line]
    assert said == f"{path}: keys that are not used, and in how many records: labels ({len(ids)})"


def opened(directory: Path) -> ServedModel:
    """What the entry point of this package makes for ``open_model``."""
    model = open_w8a8sc(directory)
    assert model is not None
    return model


def left(output: Path) -> list[str]:
    """What there is of an output and its job."""
    return sorted(path.name for path in output.parent.glob(f"{output.name}*"))


class Stop:
    """Ends a run as Ctrl-C does, the ``count``-th time that a step is so far."""

    def __init__(self, step: str, part: float, count: int = 1):
        self.step, self.part, self.count = step, part, count
        self.steps: list[str] = []

    def __call__(self, step: str, part: float) -> None:
        self.steps.append(step)
        if step == self.step and part >= self.part:
            self.count -= 1
            if self.count == 0:
                raise KeyboardInterrupt

    def run(self, options: SparseOptions) -> None:
        with pytest.raises(KeyboardInterrupt):
            run(options, self)
        assert not options.output.exists()


def test_a_ratio_is_reached_at_any_number_of_ranks(make: Make, tmp_path: Path) -> None:
    job = tmp_path / "job"
    whole = make(MODEL, target_ratio=0.45, job=job, keep_job=True, **OPTIONS)
    assert 0.97 * 0.45 <= whole.summary["ratio"] <= 0.45  # predicted from few rows
    assert whole.summary["predicted_ratio"] == pytest.approx(0.45, rel=0.01)
    assert whole.summary["target_ratio"] == 0.45 and whole.summary["price"] > 0
    assert "sparsity" not in whole.summary and "pruning" not in whole.summary
    two, again = replace(whole.options, output=tmp_path / "two", tp=2), Stop("never", 1.0)
    made = run(replace(two, keep_job=False), again)
    assert set(again.steps) == {"compress"}  # the kept job serves any number of ranks
    assert made.format == "W8A8SC TP2" and made.rate["price"] == whole.summary["price"]
    assert 0.97 * 0.45 <= made.ratio <= 0.45
    found = verify(two.output, whole.source)
    assert found.problems == () and found.checked["measured"] == 5
    assert left(job) == []


def test_it_is_proven_and_its_rows_are_its_ratio(half: Any) -> None:
    found = verify(half.output, half.source)
    assert found.problems == ()
    assert found.checked["measured"] == 5 and "recomputed" not in found.checked
    assert verify(half.output).problems == ()
    described = info(half.output)
    assert (described["ratio"], described["price"]) == (
        half.summary["ratio"],
        half.summary["price"],
    )
    stored = sum(row["stored_bytes"] for row in described["rows"])
    assert stored / sum(row["raw_bytes"] for row in described["rows"]) == described["ratio"]
    assert half.summary["weights"]["pruned"] == 0
    assert left(half.output) == ["out"]


def test_the_record_says_what_was_chosen(half: Any) -> None:
    value = json.loads((half.output / "ms_quant.json").read_text())
    assert value["record"]["rate"] == {"target_ratio": 0.5}
    assert value["rate"] == {
        "price": half.summary["price"],
        "predicted_ratio": half.summary["predicted_ratio"],
    }
    chosen = value["chosen"]["block 0"]
    assert all(0 < chosen[group]["relative_error"] < 0.1 for group in ("qkv", "gate_up"))
    errors = json.loads(open_file(half.output / PROOF).metadata["errors"])
    assert sorted(errors) == [
        "mlp.gate_proj",
        "mlp.up_proj",
        "self_attn.k_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ]
    assert all(0 < error < 0.1 for error in errors.values())


def test_evaluation_opens_it(half: Any, heldout: Path) -> None:
    model = opened(half.output)
    assert model.format == "W8A8SC TP1"
    tokens = np.load(heldout)["tokens"]
    before = perplexity(open_model(half.source), tokens).perplexity
    after = perplexity(model, tokens).perplexity
    assert before < after < 3 * before


def test_a_smaller_target_is_smaller_and_worse(half: Any, make: Make) -> None:
    small = make(MODEL, target_ratio=0.35, **OPTIONS)
    assert small.summary["ratio"] < 0.8 * half.summary["ratio"]
    assert small.summary["price"] > half.summary["price"]
    errors = [
        json.loads(open_file(made.output / PROOF).metadata["errors"]) for made in (half, small)
    ]
    assert all(errors[1][name] > 1.5 * error for name, error in errors[0].items())


Tensors = dict[str, np.ndarray]


def one_step(tensors: Tensors) -> None:
    """Changes one weight by one behind its tiles, so that only the source disagrees."""
    n, k = (len(tensors[f"{GATE_UP}.{part}"]) for part in ("deq_scale", "input_scale"))
    coded = [tensors[f"{GATE_UP}.{part}"] for part in ("weight", "index")]
    weight = decompress_matrix(*coded, matrix_info(n, k))
    row, column = np.argwhere((weight > 1) & (weight < 100))[0]
    weight[row, column] += 1
    tensors[f"{GATE_UP}.weight"], tensors[f"{GATE_UP}.index"], _ = compress_matrix(weight)
    tensors[f"{GATE_UP}.quant_bias"][row] -= int(tensors[f"{GATE_UP}.input_offset"][0])


def double_scale(tensors: Tensors) -> None:
    tensors[f"{GATE_UP}.deq_scale"][0] += 1 << 23  # doubling a float32 adds one to its exponent


def double_proof_scale(tensors: Tensors) -> None:
    tensors["mlp.gate_proj.weight_scale"][0] *= 2


def relist(directory: Path, value: dict[str, Any]) -> None:
    """States the lengths of the tiles as they are now."""
    tensors = load_file(directory / "rank_0" / BLOCK)
    for part in ("weight", "index"):
        length = len(tensors[f"{GATE_UP}.{part}"])
        value["rank_0"][f"{GATE_UP}.{part}.shape"] = [length]


def test_one_changed_weight_is_found_with_the_source(half: Any, damage: Make) -> None:
    copy = damage(half)
    copy.edit(f"rank_0/{BLOCK}", one_step)
    description = "quant_model_description_w8a8sc.json"
    copy.edit_json(description, lambda value: relist(copy.directory, value))
    copy.reseal()
    assert verify(copy.directory).problems == ()
    (problem,) = verify(copy.directory, half.source).problems
    assert problem.startswith(f"{LAYER}.mlp.gate_proj.weight: its relative squared error from the")
    assert problem.endswith(f"as {copy.directory / PROOF} states")


def test_a_changed_scale_is_found_with_the_source(half: Any, damage: Make) -> None:
    copy = damage(half)
    copy.edit(f"rank_0/{BLOCK}", double_scale)
    copy.reseal()
    assert "gate_up_proj: deq_scale differs from" in verify(copy.directory).problems[0]
    copy.edit(PROOF, double_proof_scale)
    copy.reseal()
    assert verify(copy.directory).problems == ()
    (problem,) = verify(copy.directory, half.source).problems
    assert f"{LAYER}.mlp.gate_proj.weight: its relative squared error" in problem


def restate(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the errors that a proof states."""
    metadata = dict(open_file(path).metadata)
    errors = json.loads(metadata["errors"])
    change(errors)
    save_file(load_file(path), path, {**metadata, "errors": json.dumps(errors)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda errors: errors.update({"mlp.up_proj": 0.25}), "up_proj.weight: its relative squar"),
        (lambda errors: errors.update({"mlp.up_proj": 0}), "up_proj.weight: its relative squared"),
        (
            lambda errors: errors.update({"mlp.up_proj": errors["mlp.up_proj"] * (1 + 1e-7)}),
            "mlp.up_proj.weight: its relative squared error from the source is",
        ),
        (lambda errors: errors.update({"mlp.up_proj": None}), "'errors' is malformed, expected"),
        (lambda errors: errors.update({"mlp.up_proj": float("nan")}), "'errors' is malformed"),
        (
            lambda errors: errors.pop("mlp.up_proj"),
            "'errors' is malformed, expected that of mlp.up",
        ),
        (lambda errors: errors.clear(), "'errors' is malformed, expected that of self_attn.q_proj"),
    ],
)
def test_a_changed_error_in_the_proof_is_named(
    half: Any, damage: Make, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    copy = damage(half)
    restate(copy.directory / PROOF, change)
    copy.reseal()
    problems = verify(copy.directory, half.source).problems
    assert any(message in problem for problem in problems), problems


def test_another_source_is_found(half: Any, make: Make, tiny_model: Make) -> None:
    config = json.loads((half.source / "config.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size")
    other = tiny_model("other", layers=1, seed=1, change=quieten, **{k: config[k] for k in keys})
    problems = verify(half.output, other).problems
    assert any("q_proj.weight: its relative squared error" in problem for problem in problems)


def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(
    half: Any, tmp_path: Path, file_contents: Files
) -> None:
    options = replace(half.options, output=tmp_path / "out")
    job = ["out.job", "out.job.measure", "out.partial"]
    for step, part, seen, there in (
        ("measure", 0.3, {"read", "measure"}, job[1:2]),
        ("measure", 1.0, {"measure"}, job[1:2]),
        ("quantize", 0.3, {"measure", "quantize"}, job),
        ("quantize", 1.0, {"quantize"}, job),
        ("compress", 0.3, {"quantize", "compress"}, job),
        ("compress", 1.0, {"compress"}, job),
    ):
        stop = Stop(step, part)
        stop.run(options)
        assert set(stop.steps) == seen and left(options.output) == there
    again = Stop("never", 1.0)
    assert run(options, again).finished_before is False
    assert set(again.steps) == {"compress"}
    assert file_contents(options.output) == file_contents(half.output)
    assert left(options.output) == ["out"]


@pytest.fixture
def kept(half: Any, tmp_path: Path) -> SparseOptions:
    """A run that left its job."""
    options = replace(half.options, output=tmp_path / "out", keep_job=True)
    run(options)
    assert left(options.output) == ["out", "out.job", "out.job.measure"]
    return options


def test_a_finished_run_says_so_and_removes_what_is_left(kept: SparseOptions) -> None:
    assert run(kept).finished_before is True
    assert left(kept.output) == ["out", "out.job", "out.job.measure"]
    seen = []
    again = run(replace(kept, keep_job=False), lambda step, part: seen.append(step))
    assert again.finished_before is True and seen == []
    assert left(kept.output) == ["out"]


def test_a_kept_measurement_serves_another_target(
    kept: SparseOptions, tmp_path: Path, make: Make, file_contents: Files
) -> None:
    """The job of the other goal must go first; the refusal says so and does no harm."""
    job, other = tmp_path / "out.job", replace(kept, output=tmp_path / "small", target_ratio=0.35)
    other = replace(other, job=job)
    match = r"out\.job: it was begun with rate\.target_ratio = 0\.5, now .* is 0\.35; finish it"
    with pytest.raises(MsQuantError, match=match):
        run(other)
    assert left(other.output) == [] and job.exists()
    shutil.rmtree(job)
    seen = []
    run(replace(other, keep_job=False), lambda step, part: seen.append(step))
    assert set(seen) == {"quantize", "compress"}
    small = make(MODEL, target_ratio=0.35, **OPTIONS)
    assert file_contents(other.output) == file_contents(small.output)
    assert left(kept.output) == ["out"] and left(other.output) == ["small"]


def test_another_target_into_the_same_output_is_refused(half: Any, tmp_path: Path) -> None:
    options = replace(half.options, target_ratio=0.4)
    match = r"made with rate\.target_ratio = 0\.5, now rate\.target_ratio is 0\.4; expected a new"
    with pytest.raises(MsQuantError, match=match):
        run(options)
    with pytest.raises(MsQuantError, match=r"was made with rate = .*0\.5.*, now rate is None"):
        run(replace(half.options, target_ratio=None))
    assert left(half.output) == ["out"]
    begun = replace(half.options, output=tmp_path / "out")
    Stop("quantize", 1.0).run(begun)
    with pytest.raises(MsQuantError, match=r"begun with rate\.target_ratio = 0\.5, now .* is 0\.4"):
        run(replace(begun, target_ratio=0.4))
    with pytest.raises(MsQuantError, match=r"begun with rate = .*0\.5.*, now rate is None"):
        run(replace(begun, target_ratio=None))


def test_the_job_of_a_pruning_is_refused_before_any_work(half: Any, tmp_path: Path) -> None:
    options = replace(half.options, output=tmp_path / "out")
    Stop("quantize", 0.3).run(replace(options, target_ratio=None))
    with pytest.raises(MsQuantError, match=r"begun with sparsity = 0\.5, now sparsity is None"):
        run(options)
    assert left(options.output) == ["out.job", "out.partial"]


def test_an_unreachable_ratio_is_refused_and_another_one_needs_no_measuring(
    half: Any, tmp_path: Path
) -> None:
    options = replace(half.options, output=tmp_path / "out", target_ratio=0.2)
    with pytest.raises(MsQuantError, match=r"target ratio 0\.2 cannot be reached: the smallest"):
        run(options)
    assert left(options.output) == ["out.job.measure"]
    seen = []
    made = run(replace(options, target_ratio=0.5), lambda step, part: seen.append(step))
    assert made.ratio == half.summary["ratio"] and "measure" not in seen
    assert left(options.output) == ["out"]


def test_a_quality_is_kept_and_a_killed_search_goes_on(
    lossy: SparseOptions, tmp_path: Path, file_contents: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "CLOSE", 0.5)  # fewer tries
    made = run(lossy)
    assert left(lossy.output) == ["out"]
    assert made.rate["max_ppl_increase"] == 1.0
    assert (
        1
        < made.rate["float_perplexity"]
        < made.rate["perplexity"]
        <= 2 * made.rate["float_perplexity"]
    )
    assert verify(lossy.output, lossy.model).problems == ()
    assert lossy.heldout is not None
    tokens = np.load(lossy.heldout)["tokens"]
    stated = perplexity(open_model(lossy.model), tokens).perplexity
    assert made.rate["float_perplexity"] == pytest.approx(stated, rel=1e-6)
    found = perplexity(opened(lossy.output), tokens).perplexity
    assert made.rate["perplexity"] == pytest.approx(found, rel=0.01)  # float16 of what stays float
    again = replace(lossy, output=tmp_path / "again")
    Stop("evaluate", 1.0, 2).run(again)  # in the first try
    second = Stop("quantize", 0.3, 2)
    second.run(again)
    assert second.steps.count("evaluate") == 1  # the float model's loss is known
    assert left(again.output) == ["again.job", "again.job.measure"]
    Stop("compress", 0.3).run(again)
    run(again)
    assert file_contents(again.output) == file_contents(lossy.output)
    assert left(again.output) == ["again"]
    assert run(again).finished_before is True
    with pytest.raises(MsQuantError, match=r"with rate\.max_ppl_increase = 1\.0, now .* is 0\.5"):
        run(replace(again, max_ppl_increase=0.5))


def test_a_quality_that_cannot_be_kept(lossy: SparseOptions) -> None:
    options = replace(lossy, max_ppl_increase=1e-6)
    with pytest.raises(MsQuantError, match=r"max ppl increase 0\.0001 % cannot be reached: the le"):
        run(options)
    assert left(options.output) == ["out.job.measure"]


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"target_ratio": 0.5}, "--target-ratio and --max-ppl-increase exclude each other, expected"),
    ({"sparsity": 0.5}, "--max-ppl-increase and --sparsity exclude each other, expected one"),
    ({"pruning": "magnitude"}, "--max-ppl-increase and --pruning exclude each other"),
    ({"heldout": None}, "--max-ppl-increase and --heldout FILE belong together"),
    ({"max_ppl_increase": None}, "--max-ppl-increase and --heldout FILE belong together"),
    ({"max_ppl_increase": 0.0}, "max ppl increase is 0.0, expected a share above 0 and up to 1"),
    ({"max_ppl_increase": 2.0}, "max ppl increase is 2.0, expected a share"),
    ({"max_ppl_increase": -0.1}, "max ppl increase is -0.1, expected a share"),
    ({"max_ppl_increase": float("nan")}, "max ppl increase is nan, expected a share"),
    ({"heldout": Path("none.txt")}, "none.txt: no such file"),
    ({"seq_len": 4096}, "heldout.npz: 32 tokens, expected at least 4096 for a window"),
    ({"seq_len": 1}, "seq_len is 1, expected at least 2 to predict a token of --heldout"),
]
NO_QUALITY = {"max_ppl_increase": None, "heldout": None}
REFUSALS += [
    ({**NO_QUALITY, "target_ratio": ratio}, f"target ratio is {ratio}, expected a number above 0")
    for ratio in (0.0, 1.0, -1.0, float("nan"), float("inf"))
]
REFUSALS += [
    ({**NO_QUALITY, "target_ratio": 0.5, "sparsity": 0.1}, "--target-ratio and --sparsity exclude"),
    ({**NO_QUALITY, "target_ratio": 0.5, "pruning": "magnitude"}, "--target-ratio and --pruning"),
    ({"max_ppl_increase": None, "target_ratio": 0.5}, "--heldout FILE belong together, expected"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals_come_before_any_work(
    lossy: SparseOptions, changes: dict[str, Any], message: str
) -> None:
    told: list[str] = []
    with pytest.raises(MsQuantError) as error:
        run(replace(lossy, **changes), lambda step, part: told.append(step))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert told == [] and left(lossy.output) == []


def arguments(options: SparseOptions, *more: object) -> list[str]:
    always = ["-o", options.output, "--calib", options.calib, "--tp", 1, "--seq-len", LENGTH]
    always += ["--samples", options.samples]
    for pattern in options.exclude:
        always += ["--exclude", pattern]
    return list(map(str, ["run", options.model, *always, *more]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-ratio", "0"], "target ratio is 0.0, expected a number above 0.199, which"),
        (["--target-ratio", "1"], "target ratio is 1.0, expected a number"),
        (["--target-ratio", "-1"], "target ratio is -1.0, expected a number"),
        (["--target-ratio", "nan"], "target ratio is nan, expected a number"),
        (["--max-ppl-increase", "abc%"], "max ppl increase is 'abc%', expected a share such as"),
        (["--max-ppl-increase", "%"], "max ppl increase is '%', expected a share such as"),
        (["--max-ppl-increase", "1%"], "--max-ppl-increase and --heldout FILE belong together"),
        (["--max-ppl-increase", "200%", "--heldout", "x"], "max ppl increase is 2.0, expected a"),
        (["--max-ppl-increase", "0", "--heldout", "x"], "max ppl increase is 0.0, expected a sh"),
        (["--max-ppl-increase", "nan%", "--heldout", "x"], "max ppl increase is nan, expected a"),
        (["--max-ppl-increase", "1%", "--heldout", "x"], "x: no such file"),
        (["--heldout", "x"], "--max-ppl-increase and --heldout FILE belong together"),
        (["--target-ratio", "0.5", "--sparsity", "0.5"], "--target-ratio and --sparsity exclude"),
        (["--target-ratio", "0.5", "--max-ppl-increase", "1%"], "exclude each other, expected one"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_the_command_refuses(
    lossy: SparseOptions, more: list[str], message: str, dry: list[str]
) -> None:
    done = CliRunner().invoke(app, arguments(lossy, *more, *dry))
    assert done.exit_code != 0 and isinstance(done.exception, MsQuantError)
    assert message in str(done.exception) and "\n" not in str(done.exception)
    assert done.stdout == "" and left(lossy.output) == []


def test_the_command_refuses_what_is_no_number(lossy: SparseOptions) -> None:
    done = CliRunner().invoke(app, arguments(lossy, "--target-ratio", "half"))
    assert done.exit_code == 2 and left(lossy.output) == []


def test_a_dry_run_shows_the_goal_and_writes_nothing(lossy: SparseOptions) -> None:
    options = arguments(lossy, "--dry-run", "--json")
    done = CliRunner().invoke(app, [*options, "--target-ratio", "0.5"])
    plan = json.loads(done.stdout)
    assert plan["target_ratio"] == 0.5 and "max_ppl_increase" not in plan
    assert "sparsity" not in plan and "pruning" not in plan
    goal = ["--max-ppl-increase", "0.5%", "--heldout", str(lossy.heldout)]
    plan = json.loads(CliRunner().invoke(app, [*options, *goal]).stdout)
    assert plan["max_ppl_increase"] == pytest.approx(0.005) and "target_ratio" not in plan
    shown = CliRunner().invoke(app, arguments(lossy, "--dry-run", "--target-ratio", "0.5")).stdout
    assert "target ratio" in shown and "0.5" in shown
    assert left(lossy.output) == []


def test_the_command_runs_and_its_result_is_json(
    half: Any, tmp_path: Path, file_contents: Files
) -> None:
    options = replace(half.options, output=tmp_path / "out")
    command = arguments(options, "--target-ratio", "0.5", "--json")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made.pop("output") == str(options.output) and made["finished_before"] is False
    assert made == {key: value for key, value in half.summary.items() if key != "output"}
    assert file_contents(options.output) == file_contents(half.output)
    again = json.loads(CliRunner().invoke(app, command).stdout)
    assert again["finished_before"] is True and left(options.output) == ["out"]
    shown = CliRunner().invoke(app, ["info", str(options.output)]).stdout
    assert "target ratio" in shown and "predicted ratio" in shown
    proof = ["verify", str(options.output), "--source", str(options.model), "--json"]
    assert json.loads(CliRunner().invoke(app, proof).stdout)["checked"]["measured"] == 5
