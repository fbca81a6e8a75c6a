"""What calibration has seen of a network, written and read; hostile files are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mindspore")

import mindspore as ms
from mindspore import Tensor, nn
from observed_network import ALL, Net, assert_same, batch, deep

import ms_quant
from ms_quant.cells.observations import Observations
from ms_quant.cells.observations_file import KEY
from ms_quant.errors import BadFileError, UnsupportedError
from ms_quant.files.safetensors_file import open_file
from ms_quant.files.writer import TensorPlan, write_file

pytestmark = pytest.mark.usefixtures("blocking_mindspore")


def test_what_is_written_is_read_again_and_quantizes_alike(tmp_path):
    data = [(batch(0), batch(1, 9, 8)), (batch(2), batch(3, 9, 8))]
    seen = ms_quant.calibrate(Net(), data, algorithm=ALL)
    path = seen.save(tmp_path / "new" / "o.safetensors")
    read = ms_quant.Observations.load(path)
    assert_same(read, seen, exact_sums=True)
    assert str(read) == str(seen)
    assert Path(read.save(tmp_path / "again")).read_bytes() == Path(path).read_bytes()
    made = [
        ms_quant.quantize(Net(), exclude=["extra"], calibration=found, algorithm="osl+gptq")
        for found in (data, seen, read)
    ]
    first = {name: p.asnumpy() for name, p in made[0].parameters_and_names()}
    for network in made[1:]:
        for name, parameter in network.parameters_and_names():
            np.testing.assert_array_equal(parameter.asnumpy(), first[name], err_msg=name)
    both = read.merge(Observations.load(path))
    assert both.calls == 4 and both["first"].stats.tokens == 2 * seen["first"].stats.tokens


class Odd(nn.Cell):
    """A block whose argument is whatever is given."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Dense(4, 4), nn.Dense(4, 4)

    def construct(self, x, more=None):
        return self.a(x) + self.b(x)


class Passing(nn.Cell):
    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Odd()])

    def construct(self, x, more=None):
        return self.blocks[0](x, more=more)


VALUES = [
    None,
    True,
    3,
    -0.0,
    float("-inf"),
    "text",
    [1, (2.5, {"k": None, "t": (Tensor(np.float32([1, 2])),)})],
    Tensor(np.array([1, -2], np.int64)),
    Tensor(np.array([True, False])),
    Tensor(np.float32([0.5, 3]), ms.bfloat16),
    np.arange(3, dtype=np.int16),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_arguments_of_blocks_of_every_kind(value, tmp_path):
    call = {"x": Tensor(np.ones((2, 4), "f4")), "more": value}
    seen = ms_quant.calibrate(Passing(), [call], algorithm="osl")
    read = Observations.load(seen.save(tmp_path / "o"))
    (found,), (expected,) = read.windows["blocks.0"], seen.windows["blocks.0"]
    assert repr(deep(found.named)) == repr(deep(expected.named))


def test_an_argument_that_no_file_holds_is_refused(tmp_path):
    call = {"x": Tensor(np.ones((2, 4), "f4")), "more": {1, 2}}
    seen = ms_quant.calibrate(Passing(), [call], algorithm="osl")
    with pytest.raises(
        UnsupportedError, match=r"^blocks\.0: is called with \{1, 2\} \(set\), which"
    ):
        seen.save(tmp_path / "o")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory, blocking_mindspore):
    path = tmp_path_factory.mktemp("written") / "o.safetensors"
    ms_quant.calibrate(Net(), [batch(0), batch(1)], algorithm=ALL).save(path)
    file = open_file(path)
    return {name: file.read(name) for name in file.tensors}, json.loads(file.metadata[KEY])


def rewrite(path, arrays, facts) -> None:
    plans = [TensorPlan(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_file(path, plans, lambda plan: arrays[plan.name], {KEY: json.dumps(facts)})


def set_in(facts, place: str, value) -> None:
    *parents, last = place.split("/")
    for key in parents:
        facts = facts[int(key) if isinstance(facts, list) else key]
    if value is ...:
        del facts[last]
    else:
        facts[int(last) if isinstance(facts, list) else last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("version", 2, r"ms_quant\.observations: .* expected observations of version 1"),
        ("groups", ..., r"groups: missing, expected a list"),
        ("groups/0", 3, r"groups: holds 3, expected paths of linears"),
        ("groups/0/paths", ["extra"], r"groups: extra is in two groups, expected one"),
        ("groups/0/paths", ["none"], r"groups: none has no statistics of all tokens, exp"),
        ("stats/extra/total_tokens", None, r"groups: extra has no statistics of all tokens, exp"),
        ("stats/extra/start", 3, r"groups: extra has no statistics of all tokens, expected some"),
        ("groups/0/block", "blocks.1", r"groups: block 'blocks\.1' of first has no calls or is"),
        ("calls", "2", r"calls: is '2', expected an integer"),
        ("tokens", 1, r"tokens: is 1, expected at least one of each call"),
        ("chosen", [1, 0], r"chosen: is \[1, 0\], expected ascending calls of 2"),
        ("chosen", [0], r"block_calls: blocks\.0 has calls of others than chosen ones"),
        ("stats/first", [], r"first: is \[\], expected an object"),
        ("stats/first/channels", 5, r"stats\.first: low: is float32 \[6\], expected float32 \[5\]"),
        ("stats/first/channels", 1 << 50, r"stats\.first: low: is float32 \[6\], expected float32"),
        ("stats/first/tokens", 1 << 50, r"stats\.first: counts: are of 768 values, expected those"),
        ("stats/extra/keep_rows", 0, r"stats\.extra: keep_rows: is 0, expected 1 to"),
        ("stats/first/stride", None, r"stats\.first: stride: is None, expected an integer"),
        (
            "stats/first/histogram/ends",
            [1.0, -1.0],
            r"stats\.first: ends: are \[1\.0, -1\.0\], ",
        ),
        (
            "stats/first/histogram/first",
            0,
            r"stats\.first: histogram: exponent, first bin and ",
        ),
        ("stats/first/steps", 1 << 50, r"stats\.first: step_low: missing, expected float32 values"),
        ("block_calls/blocks.0/0", 1, r"calls\.blocks\.0: holds 1, expected a call"),
        ("block_calls/blocks.0/0/arguments/0/tensor", 99, r"calls\.blocks\.0\.99: missing, expect"),
        ("block_calls/blocks.0/0/arguments/0", {"a": 1, "b": 2}, r"calls\.blocks\.0: holds {.*a v"),
        (
            "block_calls/blocks.0/0/arguments/0",
            {"float": "x"},
            r"float: is 'x', expected a hexa",
        ),
        ("block_calls/blocks.0/0/step", "a", r"step: is 'a', expected an integer"),
    ],
)
def test_a_file_that_states_what_cannot_be_is_refused(written, tmp_path, place, value, message):
    arrays, facts = written[0], json.loads(json.dumps(written[1]))
    set_in(facts, place, value)
    rewrite(tmp_path / "o", arrays, facts)
    with pytest.raises(BadFileError, match=f"^{re.escape(str(tmp_path / 'o'))}: {message}"):
        Observations.load(tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("low", lambda a: None, r"low: missing, expected float32 values"),
        ("low", lambda a: a + np.float32(np.inf), r"low: holds NaN or inf, expected numbers"),
        ("low", lambda a: a + 9, r"low: is above high, expected at most that"),
        ("high", lambda a: a.astype("f8"), r"high: is float64 \[6\], expected float32 \[6\]"),
        ("products", lambda a: a[:5], r"products: is float32 \[5, 6\], expected float32 \[6, 6\]"),
        ("counts", lambda a: a * -1, r"counts: holds -\d+ to -?\d+, expected 0 to below"),
        ("counts", lambda a: a * 2, r"counts: are of 1536 values, expected those of 128 tokens"),
        ("rows", lambda a: a[:3], r"row_places: is int64 \[128\], expected int64 \[3\]"),
        ("row_places", lambda a: a[::-1].copy(), r"row_places: do not ascend, expected each place"),
        ("row_places", lambda a: a + 1, r"row_places: holds 1 to 128, expected 0 to below 128"),
    ],
)
def test_a_file_whose_tensors_are_damaged_is_refused(written, tmp_path, name, change, message):
    arrays, full = dict(written[0]), f"stats.first.{name}"
    changed = change(arrays.pop(full))
    if changed is not None:
        arrays[full] = changed
    rewrite(tmp_path / "o", arrays, written[1])
    where = re.escape(f"{tmp_path / 'o'}: stats.first: ")
    with pytest.raises(BadFileError, match=f"^{where}{message}"):
        Observations.load(tmp_path / "o")


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(BadFileError, match=r"none: no such file$"):
        Observations.load(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"\x08\0")
    with pytest.raises(BadFileError, match=r"short: truncated, 2 bytes, expected at least 8"):
        Observations.load(tmp_path / "short")
    write_file(tmp_path / "other", [], lambda plan: np.zeros(0))
    message = r"other: ms_quant\.observations in the header: missing, expected a file of Observ"
    with pytest.raises(BadFileError, match=message):
        Observations.load(tmp_path / "other")
