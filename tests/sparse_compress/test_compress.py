"""Directories of msModelSlim compressed and restored: bits, bytes, names and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ms_quant.errors import DiskError, MsQuantError
from sparse_compress.cli import app
from sparse_compress.codec import compress_matrix, decompress_matrix
from sparse_compress.msmodelslim.compress import check
from sparse_compress.msmodelslim.compress import compress as run_request
from sparse_compress.msmodelslim.decompress import check as check_coded
from sparse_compress.msmodelslim.decompress import decompress as run_decompression
from sparse_compress.pipeline.info import info
from sparse_compress.ranks.reader import open_w8a8sc
from sparse_compress.ranks.staging import write_tensors
from sparse_compress.verify.checkpoint import verify

Tensors = dict[str, np.ndarray]


def compress(source: Path, output: Path, *progress: Any, workers: int = 2) -> Any:
    return run_request(check(source, output, workers), *progress)


def decompress(coded: Path, output: Path) -> Any:
    return run_decompression(check_coded(coded, output, 2))


WIDE, OUT = "mixer.0.in", "mixer.0.out"
LAYOUTS = {
    "v0": ("quant_model_description_{0}sc.json", "quant_model_description_{0}s.json"),
    "v1": ("quant_model_description.json", "quant_model_description.json"),
    "v1-single": ("quant_model_description.json", "quant_model_description.json"),
}


@pytest.fixture(params=["w8a8s", "w16a16s"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(plain_models: Any, tmp_path: Path) -> Callable[..., Path]:
    """``source("w8a8s", "v1", change)`` writes a directory; ``change`` edits tensors and types."""

    def one(
        kind: str = "w8a8s",
        layout: str = "v0",
        change: Callable[[Tensors, dict[str, Any]], Any] = lambda tensors, types: None,
    ) -> Path:
        tensors, types = getattr(plain_models, kind)()
        change(tensors, types)
        return plain_models.write(tmp_path / "plain", tensors, types, layout)

    return one


def same(ours: Tensors, theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(
    source: Any, plain_models: Any, tmp_path: Path, kind: str, layout: str
) -> None:
    plain, coded, back = source(kind, layout), tmp_path / "coded", tmp_path / "back"
    compress(plain, coded)
    assert verify(coded, plain).problems == ()
    decompress(coded, back)
    same(plain_models.tensors_of(back), plain_models.tensors_of(plain))
    assert plain_models.description_of(back) == plain_models.description_of(plain)
    assert verify(back, coded).problems == ()
    short = kind.removesuffix("s")
    names = [path.name.format(short) for path in map(Path, LAYOUTS[layout])]
    assert (coded / names[0]).is_file() and (back / names[1]).is_file()
    assert (coded / f"quant_model_weight_{kind}c.safetensors").is_file()
    sharded = "quant_model_weights-00001-of-00001.safetensors"
    assert (
        back / (f"quant_model_weight_{kind}.safetensors" if layout == "v0" else sharded)
    ).is_file()
    compress(back, tmp_path / "again")
    same(plain_models.tensors_of(tmp_path / "again"), plain_models.tensors_of(coded))


def test_what_hubs_add_on_either_side_is_a_note(source: Any, tmp_path: Path) -> None:
    plain, coded, back = source(), tmp_path / "coded", tmp_path / "back"
    compress(plain, coded)
    decompress(coded, back)
    for directory, names in (
        (plain, ["configuration.json", "NOTICE"]),
        (coded, ["README.md", ".gitattributes", "configuration.json", "LICENSE", ".msc"]),
        (back, ["README.md", "LICENSE", "configuration.json"]),
    ):
        for name in names:
            (directory / name).write_text(f"{{}} {directory}")
    for made, origin in ((coded, plain), (back, coded)):
        found = verify(made, origin)
        assert found.problems == () and "README.md" in found.notes[0]
    (coded / "tokenizer.json").write_text("{}")
    problems = verify(coded, plain).problems
    assert any("tokenizer.json: not listed in" in text for text in problems)


def test_tensors_and_types_of_the_result(source: Any, plain_models: Any, tmp_path: Path) -> None:
    plain = source()
    compress(plain, tmp_path / "out")
    before, after = plain_models.tensors_of(plain), plain_models.tensors_of(tmp_path / "out")
    types = plain_models.description_of(tmp_path / "out")
    for path, (n, k) in plain_models.LINEARS.items():
        parts = [f"{path}.{suffix}" for suffix in ("weight", "index", "info")]
        coded = compress_matrix(before[f"{path}.weight"])
        for name, expected in zip(parts, coded, strict=True):
            np.testing.assert_array_equal(after.pop(name), expected)
            assert types.pop(name) == "W8A8SC"
        assert coded.info.tolist() == [8, 8, k, n, 1]
        del before[f"{path}.weight"]
    same(after, before)
    expected = plain_models.w8a8s()[1] | {"model_quant_type": "W8A8SC"}
    assert types == {
        k: v for k, v in expected.items() if k.rpartition(".weight")[0] not in plain_models.LINEARS
    }


def test_float16_is_coded_as_bytes_in_high_mode(
    source: Any, plain_models: Any, tmp_path: Path
) -> None:
    plain = source("w16a16s")
    compress(plain, tmp_path / "out")
    before, after = plain_models.tensors_of(plain), plain_models.tensors_of(tmp_path / "out")
    parts = [after[f"{WIDE}.{suffix}"] for suffix in ("weight", "index", "info")]
    assert parts[2].tolist() == [8, 8, 2 * 576, 256, 1]
    matrix = decompress_matrix(*parts, "high")
    np.testing.assert_array_equal(matrix.view(np.float16), before[f"{WIDE}.weight"])
    assert plain_models.description_of(tmp_path / "out")[f"{WIDE}.bias"] == "W16A16S"


def test_what_is_left_of_a_float_model_is_not_looked_at(source: Any, tmp_path: Path) -> None:
    """msModelSlim copies the JSON files of its source, among them maybe an index."""
    plain = source("w8a8s", "v1")
    (plain / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    (plain / "model.safetensors").write_text("no tensors")
    compress(plain, tmp_path / "out")
    assert verify(tmp_path / "out", plain).problems == ()


def test_companions_are_copied(source: Any, tmp_path: Path) -> None:
    plain = source()
    compress(plain, tmp_path / "out")
    for name in ("config.json", "modeling_odd.py", "optional/quarot.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_weight_that_the_hardware_cannot_take_is_named(source: Any, tmp_path: Path) -> None:
    result = compress(source(), tmp_path / "out")
    reason = "n = 64 output channels; a compressed linear needs at least 128"
    assert result.summary.uncompressed == {"mixer.0.gate": reason}
    assert result.summary.compressed_linears == 3


def noise(path: str) -> Callable[[Tensors, dict[str, Any]], None]:
    """A weight of 320 rows, no multiple of 128, that nothing compresses."""

    def change(tensors: Tensors, types: dict[str, Any]) -> None:
        weight = np.random.default_rng(3).integers(-128, 128, (320, 512))
        tensors[f"{path}.weight"] = weight.astype(np.int8)

    return change


def test_a_weight_that_codes_too_badly_is_named_and_kept(
    source: Any, plain_models: Any, tmp_path: Path
) -> None:
    plain = source("w8a8s", "v0", noise(OUT))
    result = compress(plain, tmp_path / "out")
    sentence = "compressed, it takes more than the 163840 bytes that the runtimes accept"
    assert result.summary.uncompressed[OUT] == sentence
    assert verify(tmp_path / "out", plain).problems == ()
    assert plain_models.description_of(tmp_path / "out")[f"{OUT}.weight"] == "W8A8S"
    decompress(tmp_path / "out", tmp_path / "back")
    same(plain_models.tensors_of(tmp_path / "back"), plain_models.tensors_of(plain))


def only(path: str) -> Callable[[Tensors, dict[str, Any]], None]:
    """Leaves one linear."""

    def change(tensors: Tensors, types: dict[str, Any]) -> None:
        for name in [name for name in types if types[name] == "W8A8S" and name in tensors]:
            if not name.startswith(path):
                del tensors[name], types[name]

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([only("mixer.0.gate")], "none of 1 weights can be compressed; mixer.0.gate: n = 64 outp"),
        ([only(OUT), noise(OUT)], "mixer.0.out: compressed, it takes more than the 163840 bytes"),
    ],
)
def test_when_nothing_can_be_compressed_nothing_is_left(
    source: Any, tmp_path: Path, changes: list[Any], message: str
) -> None:
    plain = source("w8a8s", "v0", lambda *parts: [change(*parts) for change in changes])
    with pytest.raises(MsQuantError) as caught:
        compress(plain, tmp_path / "out")
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_the_same_bytes_whatever_the_workers_and_the_order(
    source: Any, plain_models: Any, tmp_path: Path, file_contents: Any
) -> None:
    plain = source()
    compress(plain, tmp_path / "one", workers=1)
    compress(plain, tmp_path / "two", workers=7)
    assert file_contents(tmp_path / "one") == file_contents(tmp_path / "two")
    assert compress(plain, tmp_path / "one").finished_before


CHILD = """
import os, signal, sys
from pathlib import Path

command, source, output, kill = sys.argv[1:]
steps = [0]

def watch(owner, name):
    original = getattr(owner, name)
    def step(*arguments, **options):
        steps[0] += 1
        if steps[0] == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(owner, name, step)

for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
    watch(Path, name)

if command == "compress":
    from sparse_compress.msmodelslim.compress import check, compress as work
else:
    from sparse_compress.msmodelslim.decompress import check, decompress as work
work(check(Path(source), Path(output)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_killed_at_every_step_it_ends_with_the_same_bytes(
    source: Any,
    tmp_path: Path,
    file_contents: Any,
    package_environment: dict[str, str],
    command: str,
) -> None:
    """Each run is killed one step on disk later; every second one finds what the last one left."""
    begin, output = source(), tmp_path / "out"
    if command == "decompress":
        compress(begin, tmp_path / "coded")
        begin = tmp_path / "coded"
    run = {"compress": compress, "decompress": decompress}[command]
    run(begin, tmp_path / "expected")
    expected, killed = file_contents(tmp_path / "expected"), 0
    for step in range(1, 100, 2):
        arguments = [command, str(begin), str(output), str(step)]
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", CHILD, *arguments],
                env=package_environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
            if done.returncode == 0:
                break
            killed += 1
            assert not output.exists() or (output / "ms_quant.json").exists()
        if done.returncode == 0:
            break
    assert killed > 5 and file_contents(output) == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_part_is_not_made_again(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, parts = source(), []

    def stop(step: str, part: float) -> None:
        parts.append(part)
        if len(parts) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(plain, tmp_path / "out", stop)
    coded = []

    def count(*arguments: Any, **options: Any) -> Any:
        coded.append(1)
        return compress_matrix(*arguments, **options)

    monkeypatch.setattr("sparse_compress.msmodelslim.compress.compress_matrix", count)
    compress(plain, tmp_path / "out")
    assert len(coded) == 1 and not (tmp_path / "out.partial").exists()


def test_what_is_begun_stays_when_the_disk_is_full(
    source: Any, tmp_path: Path, file_contents: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = source()
    compress(plain, tmp_path / "expected")

    def full(path: Path, *arguments: Any) -> Any:
        if path.name == "tensor-00001.safetensors":
            raise DiskError("no space left on device")
        return write_tensors(path, *arguments)

    monkeypatch.setattr("sparse_compress.msmodelslim.rewrite.write_tensors", full)
    with pytest.raises(DiskError):
        compress(plain, tmp_path / "out")
    assert (tmp_path / "out.partial" / "tensors" / "tensor-00000.safetensors").is_file()
    monkeypatch.undo()
    compress(plain, tmp_path / "out")
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "expected")


def test_files_of_a_versioned_directory_are_of_bounded_size(
    source: Any, plain_models: Any, tmp_path: Path
) -> None:
    plain = source("w8a8s", "v1")
    compress(plain, tmp_path / "out")
    request = check_coded(tmp_path / "out", tmp_path / "back", 2)
    run_decompression(replace(request, shard_bytes=100_000))
    files = sorted((tmp_path / "back").glob("quant_model_weights-*.safetensors"))
    assert len(files) > 2
    assert [path.name[20:] for path in files][
        -1
    ] == f"{len(files):05d}-of-{len(files):05d}.safetensors"
    same(plain_models.tensors_of(tmp_path / "back"), plain_models.tensors_of(plain))
    assert verify(tmp_path / "back", plain).problems == ()


def test_one_weight_is_in_memory_at_a_time(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is large and not coded is read in pieces."""
    plain = source()
    monkeypatch.setattr("sparse_compress.msmodelslim.directory.CHUNK_ELEMENTS", 1000)
    pieces = []

    def rows(file: Any, name: str) -> Any:
        pieces.append(name)
        yield 0, file.read(name)[:20]
        yield 20, file.read(name)[20:]

    monkeypatch.setattr("sparse_compress.msmodelslim.directory.row_chunks", rows)
    compress(plain, tmp_path / "out")
    assert set(pieces) == {"embed.weight", "mixer.0.gate.weight"}
    assert verify(tmp_path / "out", plain).problems == ()


def test_the_plan(source: Any, tmp_path: Path) -> None:
    plan = check(source(), tmp_path / "out").plan()
    assert plan["format"] == "W8A8SC" and len(plan["compressed"]) == 3
    assert list(plan["uncompressed"]) == ["mixer.0.gate"]
    compress(tmp_path / "plain", tmp_path / "out")
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert plan["disk_bytes"] > plan["output_bytes"] > written - 10_000


def test_the_commands(source: Any, tmp_path: Path) -> None:
    plain, out, back = (str(path) for path in (source(), tmp_path / "out", tmp_path / "back"))
    run = CliRunner().invoke
    done = run(app, ["compress", plain, "-o", out, "--dry-run", "--json"])
    assert json.loads(done.stdout)["output"] == out and not Path(out).exists()
    done = run(app, ["compress", plain, "-o", out, "--json", "--workers", "2"])
    assert json.loads(done.stdout)["compressed_linears"] == 3
    assert "mixer.0.gate stays as it is: n = 64" in done.stderr
    assert run(app, ["compress", plain, "-o", out]).exit_code == 0
    assert run(app, ["verify", out, "--source", plain]).exit_code == 0
    assert "mixer.0.in" in run(app, ["info", out], env={"COLUMNS": "200"}).stdout
    done = run(app, ["decompress", out, "-o", back, "--json"])
    assert json.loads(done.stdout)["format"] == "W8A8S"
    assert run(app, ["verify", back, "--source", out, "--json"]).exit_code == 0


def test_info_and_its_page(source: Any, tmp_path: Path, kind: str) -> None:
    compress(source(kind), tmp_path / "out")
    result = info(tmp_path / "out", tmp_path / "page.html")
    assert [row["layer"] for row in result["rows"]] == ["visual.blocks.0.proj", WIDE, OUT]
    row = result["rows"][1]
    assert row["shape"] == [256, 576] and row["raw_bytes"] == 256 * 576 * (1 + (kind == "w16a16s"))
    assert (0.45 < row["sparsity"] < 0.6) if kind == "w8a8s" else (0.65 < row["sparsity"] < 0.8)
    assert result["target"] == "msmodelslim" and result["format"] == f"{kind}c".upper()
    assert WIDE in (tmp_path / "page.html").read_text()


def test_a_directory_without_our_record_is_read_too(source: Any, tmp_path: Path) -> None:
    """As msModelSlim itself would have written it."""
    compress(source(), tmp_path / "out")
    (tmp_path / "out" / "ms_quant.json").unlink()
    assert len(info(tmp_path / "out")["rows"]) == 3
    decompress(tmp_path / "out", tmp_path / "back")
    assert verify(tmp_path / "back", tmp_path / "plain").problems == ()


def test_evaluation_says_what_it_cannot_read(source: Any, tmp_path: Path) -> None:
    compress(source(), tmp_path / "out")
    with pytest.raises(MsQuantError, match="model_type 'unheard-of' is not supported"):
        open_w8a8sc(tmp_path / "out")


def bits(name: str, dtype: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, types: tensors.update({name: tensors[name].astype(dtype)})


def retype(name: str, kind: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, types: types.update({name: kind})


def drop(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, types: tensors.pop(name)


def put(name: str, array: np.ndarray) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, types: tensors.update({name: array})


REFUSED: list[tuple[str, Any, str]] = [
    ("w8a8s", drop(f"{WIDE}.weight"), f"names tensor '{WIDE}.weight', expected it in a file"),
    ("w8a8s", drop(f"{WIDE}.deq_scale"), f"names tensor '{WIDE}.deq_scale', expected it"),
    ("w8a8s", retype("x.weight", "FLOAT"), "names tensor 'x.weight', expected it in a file"),
    ("w8a8s", retype("norm.weight", 3), "norm.weight is 3, expected a type"),
    (
        "w8a8s",
        bits(f"{WIDE}.weight", np.float16),
        f"tensor '{WIDE}.weight' is F16 [256, 576], expected I8 [any x any] of a W8A8S",
    ),
    (
        "w8a8s",
        put(f"{WIDE}.weight", np.zeros(256, np.int8)),
        "is I8 [256], expected I8 [any x any] of a W8A8S",
    ),
    ("w8a8s", bits("embed.weight", np.int8), "'embed.weight' is I8 [50, 320], expected a float"),
    (
        "w8a8s",
        retype(f"{WIDE}.weight", "FLOAT"),
        "tensor 'mixer.0.in.weight' is I8 [256, 576], expected a float type",
    ),
    (
        "w8a8s",
        retype(f"{WIDE}.deq_scale", "FLOAT"),
        f"{WIDE}.deq_scale is 'FLOAT', expected 'W8A8S' as {WIDE}.weight",
    ),
    (
        "w8a8s",
        lambda tensors, types: types.pop(f"{WIDE}.quant_bias"),
        f"{WIDE}.quant_bias is None, expected 'W8A8S'",
    ),
    (
        "w8a8s",
        retype("norm.weight", "W16A16S"),
        "tensor 'norm.weight' is BF16, which the Atlas 300I Duo does not have; expected F16: set",
    ),
    (
        "w8a8s",
        retype("scalar", "W8A8S"),
        "scalar is W8A8S and '.weight' is None, expected one type",
    ),
    (
        "w8a8s",
        put(f"{WIDE}.quant_bias", np.zeros(3, np.int32)),
        f"tensor '{WIDE}.quant_bias' is I32 [3], expected 256 values",
    ),
    (
        "w8a8s",
        put(f"{WIDE}.index", np.zeros(8, np.int8)),
        f"tensor '{WIDE}.index' is there, expected none beside {WIDE}.weight",
    ),
    (
        "w16a16s",
        bits(f"{WIDE}.weight", np.float32),
        "is F32 [256, 576], expected F16 [any x any] of a W16A16S",
    ),
    (
        "w8a8s",
        lambda tensors, types: (
            types.update({k: "FLOAT" for k in types if types[k] == "W8A8S"})
            or [tensors.update({k: tensors[k].astype("f4")}) for k in tensors]
        ),
        "names no weight of type W8A8S or W16A16S",
    ),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_compressed_is_refused_before_any_work(
    source: Any, tmp_path: Path, number: int
) -> None:
    kind, change, message = REFUSED[number]
    plain = source(kind, "v0", change)
    with pytest.raises(MsQuantError) as caught:
        compress(plain, tmp_path / "out")
    assert message in str(caught.value), str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_what_is_compressed_already_is_refused(source: Any, tmp_path: Path) -> None:
    compress(source(), tmp_path / "out")
    with pytest.raises(MsQuantError, match=r"visual\.blocks\.0\.proj\.weight is compressed alrea"):
        compress(tmp_path / "out", tmp_path / "again")
    with pytest.raises(MsQuantError, match="names no compressed weight, expected some"):
        decompress(tmp_path / "plain", tmp_path / "again")


@pytest.mark.parametrize("place", ["plain", "plain/out", "."])
def test_an_output_that_overlaps_the_source_is_refused(
    source: Any, tmp_path: Path, place: str
) -> None:
    with pytest.raises(MsQuantError, match="expected one apart from it"):
        compress(source(), tmp_path / place)


def test_another_source_is_refused_by_a_finished_output(
    source: Any, plain_models: Any, tmp_path: Path
) -> None:
    plain = source()
    compress(plain, tmp_path / "out")
    plain_models.edit(plain, lambda types: types.update(group_size=1))
    with pytest.raises(MsQuantError, match=r"out: exists and it was made with description_sha256"):
        compress(plain, tmp_path / "out")


FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("half a file", lambda d: cut(d, "quant_model_weights-00002-of-00002.safetensors"), "truncat"),
    (
        "a path in the index",
        lambda d: index(d, "../x.safetensors"),
        "is '../x.safetensors', expected a file name without a path",
    ),
    ("a missing shard", lambda d: index(d, "x.safetensors"), "x.safetensors: no such file, exp"),
    ("another shard", lambda d: index(d, "quant_model_weights-00002-of-00002.safetensors"), "tens"),
    (
        "no description",
        lambda d: (d / "quant_model_description.json").unlink(),
        "is no directory of msM",
    ),
    (
        "two descriptions",
        lambda d: (d / "quant_model_description_w8a8s.json").write_text("{}"),
        "expected one quant_model_description*.json",
    ),
    ("nested", lambda d: describe(d, '{"a":' * 99 + "1" + "}" * 99), "64 levels of nesting"),
    ("twice", lambda d: describe(d, '{"a.weight": "FLOAT", "a.weight": "X"}'), "appears twice"),
    ("no object", lambda d: describe(d, "[]"), "found a JSON list, expected an object"),
    ("not a number", lambda d: describe(d, '{"a": NaN}'), "NaN, expected a finite number"),
]


def cut(directory: Path, name: str) -> None:
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])


def index(directory: Path, shard: str) -> None:
    path = directory / "quant_model_weights.safetensors.index.json"
    value = json.loads(path.read_text())
    value["weight_map"][min(value["weight_map"])] = shard
    path.write_text(json.dumps(value))


def describe(directory: Path, text: str) -> None:
    (directory / "quant_model_description.json").write_text(text)


@pytest.mark.parametrize("defect", FILES, ids=[defect[0] for defect in FILES])
def test_malformed_files_are_refused(source: Any, tmp_path: Path, defect: Any) -> None:
    _, change, message = defect
    plain = source("w8a8s", "v1")
    change(plain)
    with pytest.raises(MsQuantError) as caught:
        compress(plain, tmp_path / "out")
    assert message in str(caught.value), str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def flip(name: str, place: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(np.uint8)[place] ^= 1

    return change


def info_of(values: list[int]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{WIDE}.info": np.array(values, np.int64)})


CODED_DEFECTS: list[tuple[Callable[[Tensors], Any], str]] = [
    (flip(f"{WIDE}.weight", 4), f"tensor '{WIDE}.weight': tile 0, engine 0: checksum mismatch"),
    (flip(f"{WIDE}.index", 4), f"tensor '{WIDE}.weight': tile 0: the index record points to"),
    (info_of([8, 8, 576, 256, 2]), f"'{WIDE}.info': the info tensor is [8, 8, 576, 256, 2]; exp"),
    (info_of([8, 4, 576, 256, 1]), "expected [8, 8, k, n, 1]"),
    (info_of([8, 8, 1 << 60, 1 << 60, 1]), "the index has 48 bytes; a (1152921504606846976, "),
    (info_of([8, 8, -1, -1, 1]), "expected at least one row and column"),
    (info_of([8, 8, 320, 64, 1]), "fewer than 128 rows need k <= 256"),
    (
        lambda tensors: tensors.update({f"{WIDE}.index": tensors[f"{WIDE}.index"][:-8]}),
        f"tensor '{WIDE}.info': the index has 40 bytes; a (256, 576) weight takes 48",
    ),
    (
        lambda tensors: tensors.update({f"{WIDE}.weight": tensors[f"{WIDE}.weight"][:-128]}),
        "the weight is truncated: the tile ends at byte",
    ),
    (
        lambda tensors: tensors.pop(f"{WIDE}.info"),
        f"has no tensor '{WIDE}.info', expected it of a W8A8SC",
    ),
    (
        lambda tensors: tensors.update({f"{WIDE}.info": np.zeros(5, np.int32)}),
        "is I32 [5], expected I64 [5] of a W8A8SC",
    ),
]


@pytest.mark.parametrize("number", range(len(CODED_DEFECTS)))
def test_defects_of_coded_tensors_are_named(source: Any, tmp_path: Path, number: int) -> None:
    change, message = CODED_DEFECTS[number]
    coded = tmp_path / "coded"
    compress(source(), coded)
    path = coded / "quant_model_weight_w8a8sc.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    problems = verify(coded).problems
    assert any(message in problem for problem in problems), problems
    for work in (lambda: decompress(coded, tmp_path / "back"), lambda: info(coded)):
        with pytest.raises(MsQuantError) as caught:
            work()
        assert message in str(caught.value), str(caught.value)
    assert list(tmp_path.glob("back*")) == []


def test_an_odd_row_of_bytes_is_no_float16(source: Any, tmp_path: Path) -> None:
    compress(source("w16a16s"), tmp_path / "out")
    path = tmp_path / "out" / "quant_model_weight_w16a16sc.safetensors"
    tensors = load_file(path)
    tensors[f"{WIDE}.info"][2] -= 1
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(MsQuantError, match="states rows of 1151 bytes, expected a multiple of 2"):
        decompress(tmp_path / "out", tmp_path / "back")


def test_a_tile_of_the_other_mode_is_refused(
    source: Any, plain_models: Any, tmp_path: Path
) -> None:
    compress(source(), tmp_path / "out")
    path = tmp_path / "out" / "quant_model_weight_w8a8sc.safetensors"
    tensors = load_file(path)
    weight = plain_models.w8a8s()[0][f"{WIDE}.weight"]
    high = compress_matrix(weight, "high")
    tensors |= {f"{WIDE}.weight": high.weight, f"{WIDE}.index": high.index}
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(MsQuantError, match="belongs to the other mode than the one asked for"):
        decompress(tmp_path / "out", tmp_path / "back")


def test_verification_compares_with_the_source(
    source: Any, plain_models: Any, tmp_path: Path
) -> None:
    plain = source()
    compress(plain, tmp_path / "out")
    path = plain / "quant_model_weight_w8a8s.safetensors"
    tensors = load_file(path)
    tensors[f"{WIDE}.weight"][3, 5] ^= 1
    tensors["embed.weight"][7, 7] = 9
    path.unlink()
    save_file(tensors, path)
    (plain / "modeling_odd.py").write_text("# other")
    problems = verify(tmp_path / "out", plain).problems
    assert len(problems) == 3
    assert problems[0].startswith("embed.weight: 1 values differ from those of")
    assert problems[1].startswith(f"{WIDE}.weight: 1 values differ from those of")
    assert "modeling_odd.py: differs from the source's" in problems[2]
    plain_models.edit(plain, lambda types: types.update({"norm.weight": "X"}))
    (problem,) = verify(tmp_path / "out", plain).problems
    assert "norm.weight stands for 'FLOAT', expected 'X'" in problem


def test_every_flipped_byte_of_every_file_is_found(source: Any, tmp_path: Path) -> None:
    compress(source(), tmp_path / "out")
    for path in sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert verify(tmp_path / "out").problems, f"{path.name} byte {place}"
        path.write_bytes(content)
    (tmp_path / "out" / "extra.py").write_text("")
    assert "extra.py: not listed in" in verify(tmp_path / "out").problems[0]


def test_a_float_source_is_refused(source: Any, tiny_model: Any, tmp_path: Path) -> None:
    compress(source(), tmp_path / "out")
    with pytest.raises(MsQuantError, match=r"expected one quant_model_description\*\.json"):
        verify(tmp_path / "out", tiny_model("float"))
