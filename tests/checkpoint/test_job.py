"""The job directory: what it refuses, what it keeps, and what it deletes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plans import usual

from ms_quant.errors import MsQuantError
from ms_quant.files import lock
from ms_quant.job import directory as job_module
from ms_quant.job.directory import (
    JobDirectory,
    environment,
    find_difference,
)
from ms_quant.job.states import HiddenStates, StoredStates
from ms_quant.models.names import GroupId
from ms_quant.numerics.activation import ObservedRange
from ms_quant.numerics.linear import QuantizedLinear, StaticActivation, int8_linear
from ms_quant.numerics.storage import DTYPES
from ms_quant.quantization.block import QuantizedBlock
from ms_quant.schemes.table import SCHEMES

RECORD = {"scheme": "W8A8", "seed": 0, "environment": {"threads": 2}}


def begin(directory: Path, record: dict = RECORD, any_environment: bool = False) -> JobDirectory:
    """A job that some process began and left."""
    job = JobDirectory(directory, record, any_environment, scheme_of=lambda path: SCHEMES["W8A8"])
    with job.open():
        return job


def static_linear(seed: int = 0) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    activation = StaticActivation(np.float32(0.25), -7, rng.random(4, np.float32) + 1)
    weight = rng.integers(-127, 128, (3, 4)).astype(np.int8)
    return int8_linear(weight, rng.random(3, np.float32), None, activation)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, ("a", 1, 2)),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1]}}, ("a.b", [1, 2], [1])),
        ({}, {"alpha": 0.5}, ("alpha", None, 0.5)),
        ({"x": {"y": 1}}, {"x": 3}, ("x", {"y": 1}, 3)),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, ("b", 1, 2)),  # the first of the old record
    ],
)
def test_find_difference(old: dict, new: dict, found: tuple | None) -> None:
    assert find_difference(old, new) == found


def test_another_request_is_refused_with_both_values(tmp_path: Path) -> None:
    begin(tmp_path / "job")
    with pytest.raises(MsQuantError, match=r"begun with seed = 0, now seed is 5; .*delete"):
        JobDirectory(tmp_path / "job", {**RECORD, "seed": 5})
    with pytest.raises(MsQuantError, match=r"begun with alpha = None, now alpha is 0\.25"):
        JobDirectory(tmp_path / "job", {**RECORD, "alpha": 0.25})
    begin(tmp_path / "job")


def test_another_environment_is_refused_unless_the_user_says_so(tmp_path: Path) -> None:
    begin(tmp_path / "job")
    other = {**RECORD, "environment": {"threads": 4}}
    with pytest.raises(MsQuantError, match=r"threads = 2, now environment\.threads is 4; .*--any-"):
        JobDirectory(tmp_path / "job", other)
    begin(tmp_path / "job", other, any_environment=True)
    with pytest.raises(MsQuantError, match="begun with scheme"):
        JobDirectory(tmp_path / "job", {**other, "scheme": "X"}, any_environment=True)


def test_a_changed_source_is_named_by_its_file_and_not_by_its_hashes(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"bytes": 1}, "b.safetensors": {"bytes": 2}}
    source = {"config_sha256": "0" * 64, "shards": shards}
    begin(tmp_path / "job", {**RECORD, "source": source})
    for change, name in (
        ({"config_sha256": "1" * 64}, "config.json"),
        ({"shards": {**shards, "b.safetensors": {"bytes": 3}}}, "b.safetensors"),
        ({"shards": {**shards, "c.safetensors": {"bytes": 2}}}, "c.safetensors"),
    ):
        with pytest.raises(MsQuantError) as error:
            JobDirectory(tmp_path / "job", {**RECORD, "source": {**source, **change}})
        assert str(error.value) == (
            f"{tmp_path / 'job'}: the source model changed since it was begun ({name} differs); "
            "delete the directory to start again"
        )


def test_environment_names_versions_cpu_and_threads() -> None:
    found = environment()
    assert sorted(found) == ["cpu", "kernels", "numpy", "threads"]
    assert sorted(environment(True)) == sorted([*found, "mindspore"])
    assert found["numpy"] == np.__version__
    assert found == json.loads(json.dumps(environment()))
    if hasattr(os, "sched_getaffinity"):
        assert found["threads"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        ".env.tmp",
        ".git/config",
        ".notes.123.tmp",
        "block-00000.safetensors",
        ".job.json.123.tmp/mine",
        "ms_quant.lock",
    ],
)
def test_a_directory_that_is_no_job_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "job" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(MsQuantError, match="exists but holds no job"):
        JobDirectory(tmp_path / "job", RECORD)
    assert [path for path in (tmp_path / "job").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


def test_nothing_is_written_before_a_job_is_opened(tmp_path: Path) -> None:
    JobDirectory(tmp_path / "job", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_files_of_someone_else_outlive_the_job(tmp_path: Path) -> None:
    job = begin(tmp_path / "job")
    mine = [job.directory / name for name in (".env.tmp", ".git/config", "notes.txt")]
    (job.directory / ".git").mkdir()
    for path in mine:
        path.write_text("mine")
    job.finish_block(0, QuantizedBlock({"a": static_linear()}), {})
    (job.directory / ".block-00001.safetensors.9.tmp").write_text("half")
    with JobDirectory(job.directory, RECORD).open():
        job.remove()
    assert sorted(path for path in job.directory.rglob("*") if path.is_file()) == mine


def test_a_second_process_is_refused_and_breaks_nothing(
    tmp_path: Path, package_environment: dict[str, str]
) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from ms_quant.job.directory import JobDirectory\n"
        "with JobDirectory(Path(sys.argv[1]), {}).open():\n"
        "    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "job")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=package_environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        temporary = tmp_path / "job" / f".block-00000.safetensors.{process.pid}.tmp"
        temporary.write_text("half")
        with pytest.raises(MsQuantError, match="another process works on this job"):
            begin(tmp_path / "job", {})
        assert temporary.exists()
        process.kill()
    begin(tmp_path / "job", {})  # the lock died with its owner
    assert not temporary.exists()


def test_systems_without_locks_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    job = begin(tmp_path / "job")
    with job.open():
        job.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_broken_record_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(MsQuantError, match=r"job\.json: not valid JSON"):
        JobDirectory(tmp_path, RECORD)


def test_temporaries_of_a_killed_run_are_deleted(tmp_path: Path) -> None:
    (tmp_path / ".job.json.123.tmp").write_text("half")
    (tmp_path / ".hidden-00001.npy.123.tmp").write_text("half")
    begin(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.json", "ms_quant.lock"]


def test_blocks_finish_and_come_back(tmp_path: Path) -> None:
    job = begin(tmp_path / "job")
    assert job.finished() == set()
    linear = static_linear()
    statistics = {"qkv.l2_norm": np.arange(4, dtype=np.float32)}
    gain = np.float32([1, 2])
    block = QuantizedBlock({"a.b": linear}, {"norm.weight": gain}, {"qkv": {"alpha": 0.5}})
    block.seconds["qkv"], block.errors["qkv"] = 1.5, 0.25
    job.finish_block(0, block, statistics)
    assert job.finished() == {0}
    again = begin(tmp_path / "job")
    found = again.linear(0, "a.b")
    assert isinstance(found.activation, StaticActivation)
    np.testing.assert_array_equal(found.weight, linear.weight)
    light = again.linear(0, "a.b", with_weight=False)
    assert light.weight.shape == (3, 4) and light.weight.strides == (0, 0)  # no memory
    np.testing.assert_array_equal(light.deq_scale, linear.deq_scale)
    np.testing.assert_array_equal(found.weight_scale, linear.weight_scale)
    np.testing.assert_array_equal(found.quant_bias, linear.quant_bias)
    np.testing.assert_array_equal(found.static.input_scale, linear.static.input_scale)
    assert (found.activation.scale, found.activation.offset) == (np.float32(0.25), -7)
    assert found.activation.scale.dtype == np.float32
    changed = again.changed_tensor("model.layers.0.norm.weight")
    np.testing.assert_array_equal(changed, gain)
    assert again.changed_tensor("model.layers.0.other.weight") is None
    assert again.changed_tensor("model.norm.weight") is None
    np.testing.assert_array_equal(again.statistic(0, "qkv.l2_norm"), np.arange(4))
    assert again.notes(0) == {"qkv": {"alpha": 0.5}}
    assert again.measured() == {GroupId(0, "qkv"): (1.5, 0.25)}


def test_blocks_finish_in_any_order(tmp_path: Path) -> None:
    job = begin(tmp_path / "job")
    for index, finished in ((3, {3}), (1, {1, 3}), (0, {0, 1, 3})):
        job.finish_block(index, QuantizedBlock({"a": static_linear()}), {})
        assert job.finished() == finished
    (tmp_path / "job" / "block-00002.1.safetensors").write_bytes(b"")  # of another format
    assert job.finished() == {0, 1, 3}


def test_remove_deletes_the_record_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = begin(tmp_path / "job")
    job.finish_block(0, QuantizedBlock({"a": static_linear()}), {})
    unlink, order = Path.unlink, []

    def recorded(path: Path, missing_ok: bool = False) -> None:
        order.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", recorded)
    job.remove()
    assert order == ["block-00000.safetensors", "job.json", "ms_quant.lock"]
    assert not job.directory.exists()


def test_hidden_states_appear_when_whole_and_come_back(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(np.float32)
    path = tmp_path / "hidden.npy"
    hidden = HiddenStates(path, rows.shape)
    for start in range(0, 5, 2):  # whole batches, and a last one that is short
        hidden.append(rows[start : start + 2])
    assert not path.exists()
    hidden.commit()
    assert [found.name for found in tmp_path.iterdir()] == ["hidden.npy"]
    np.testing.assert_array_equal(np.load(path), rows)
    stored = StoredStates(path, rows.shape)
    np.testing.assert_array_equal(stored[1:3], rows[1:3])
    np.testing.assert_array_equal(stored[4:9], rows[4:])
    np.testing.assert_array_equal(
        stored.take(np.array([14, 0, 7])), rows.reshape(15, 2)[[14, 0, 7]]
    )
    part = stored[0:1]
    part[:] = 0  # a copy, not a map of the file
    np.testing.assert_array_equal(np.load(path), rows)


def test_hidden_states_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = HiddenStates(tmp_path / "hidden.npy", (1, 1, 1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(job_module.os, "fsync", full)
    with pytest.raises(MsQuantError, match=r"hidden\.npy: no space left .* hidden states"):
        hidden.commit()
    assert not (tmp_path / "hidden.npy").exists()


def test_what_is_not_known_yet_is_not_compared_but_must_be_there(tmp_path: Path) -> None:
    with JobDirectory(tmp_path / "job", {**RECORD, "price": 0.5}).open():
        pass
    JobDirectory(tmp_path / "job", RECORD, unknown=("price",))
    with pytest.raises(MsQuantError, match=r"begun with price = 0\.5, now price is None"):
        JobDirectory(tmp_path / "job", RECORD)
    with pytest.raises(MsQuantError, match="begun with seed = "):
        JobDirectory(tmp_path / "job", {**RECORD, "seed": 5}, unknown=("price",))
    with JobDirectory(tmp_path / "plain", RECORD).open():
        pass
    with pytest.raises(MsQuantError, match="with price = None, now price is 'to be found'"):
        JobDirectory(tmp_path / "plain", RECORD, unknown=("price",))


@pytest.mark.parametrize("name", SCHEMES)
def test_linears_of_every_scheme_come_back(tmp_path: Path, name: str) -> None:
    (scheme, scales), rng = usual(name), np.random.default_rng(0)
    weight = rng.standard_normal((6, 128), np.float32)
    x = rng.standard_normal((5, 128), np.float32)
    seen = ObservedRange(x.min(axis=0), x.max(axis=0), DTYPES["bfloat16"], "x")
    grid = scheme.weight.fit(weight, "w", scales.dtype(DTYPES["bfloat16"]))
    linear = QuantizedLinear(grid.round(weight), grid, None, scheme.activation.fit(seen, None))
    job = JobDirectory(tmp_path / "job", RECORD, scheme_of=lambda path: scheme)
    with job.open():
        job.finish_block(0, QuantizedBlock({"a": linear}), {})
    for decode in (False, True):
        found, expected = job.linear(0, "a").forward(x, decode), linear.forward(x, decode)
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
