"""The public names of the package: what they are, their types, and their examples."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ms_quant
import sparse_compress

ROOT = Path(ms_quant.__file__).parents[1]
OF_NETWORKS = ("quantize", "calibrate", "summary", "save_quantized", "load_quantized")


def test_every_public_name_is_there_and_listed():
    for name in ms_quant.__all__:
        assert getattr(ms_quant, name) is not None, name
    assert set(ms_quant.__all__) <= set(dir(ms_quant))
    assert set(ms_quant._PUBLIC) == set(ms_quant.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = ms_quant.quantise  # type: ignore[attr-defined]


def test_names_are_imported_when_they_are_used(package_environment):
    script = "import sys, ms_quant; ms_quant.load_recipe; assert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], env=package_environment, check=True)


USER = """
import ms_quant
import sparse_compress

reveal_type(ms_quant.quantize)
reveal_type(ms_quant.calibrate(None, [])["0"].stats.low)
reveal_type(ms_quant.summary(None).linears[0].error)
reveal_type(ms_quant.save_quantized(None, "x"))
reveal_type(ms_quant.load_recipe("x.yaml").rules[0].scheme)
ms_quant.quantize(None, algorithm=1)
ms_quant.TimestepPolicyConfig().register(range(3), 2)
reveal_type(ms_quant.quantize_checkpoint)
reveal_type(ms_quant.quantize_checkpoint("a", "b").outputs[0].report[0].chosen)
reveal_type(ms_quant.verify_checkpoint("a").problems)
reveal_type(ms_quant.convert_checkpoint("a", "b", "ascend").path)
reveal_type(ms_quant.perplexity("a", "b.txt").loss)
reveal_type(ms_quant.compare("a", "b", "c.txt").loss_difference_error)
reveal_type(ms_quant.generate("a", "b").tokens)
reveal_type(ms_quant.open_model("a").linear("b"))
reveal_type(sparse_compress.compress_checkpoint("a", "b", calibration="c").ratio)
ms_quant.quantize_checkpoint("a", "b", samples="64")
"""


def test_a_user_s_type_checker_sees_the_types(tmp_path):
    """Signatures are real: what a program gets is not Any, and a wrong argument is told."""
    program = tmp_path / "program.py"
    program.write_text(USER)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
        + [
            "--ignore-missing-imports",
            "--no-error-summary",
            "--follow-imports=silent",
            str(program),
        ],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    lines = [line.split(": ", 2)[2] for line in found.splitlines()]
    assert "calibration: " in lines[0] and "progress: " in lines[0], found
    assert "ndarray[" in lines[1], found
    assert "float" in lines[2] and "None" in lines[2]
    assert lines[3:5] == ['Revealed type is "str"'] * 2
    assert lines[5].startswith('Argument "algorithm" to "quantize" has incompatible type "int"')
    assert lines[6].startswith('Argument 2 to "register" of "TimestepPolicyConfig" has incompat')
    assert "calibration: " in lines[7] and lines[7].endswith('ms_quant.pipeline.result.Result"')
    assert "Any" not in lines[7].replace("Mapping[str, Any]", "")
    assert [line.removeprefix("Revealed type is ").strip('"') for line in lines[8:16]] == [
        "typing.Mapping[str, Any]",
        "tuple[str, ...]",
        "pathlib.Path",
        "float",
        "float | None",
        "tuple[int, ...]",
        "ms_quant.numerics.linear.QuantizedLinear | None",
        "float",
    ]
    assert lines[16].startswith('Argument "samples" to "quantize_checkpoint" has incompatible type')


@pytest.mark.parametrize("package", [ms_quant, sparse_compress])
def test_packages_say_that_they_are_typed(package):
    assert (Path(package.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", [*OF_NETWORKS, "Observations", "QuantLinear"])
def test_the_examples_of_a_docstring_run(name, tmp_path, monkeypatch, request):
    pytest.importorskip("mindspore")
    request.getfixturevalue("blocking_mindspore")
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(getattr(ms_quant, name)) or ""
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, "no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    ms_quant.TimestepManager.set_timestep_idx(None)
    ms_quant.TimestepManager.set_timestep_idx_max(None)
    assert not said, "".join(said)


SECTIONS = ("Args:", "Returns:", "Raises:", "Supported Platforms:", "Examples:")


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_docstrings_have_every_section_and_argument(name):
    pytest.importorskip("mindspore")
    function = getattr(ms_quant, name)
    text = inspect.getdoc(function) or ""
    wanted = [section for section in SECTIONS if (name, section) != ("summary", "Raises:")]
    assert [section for section in wanted if f"\n{section}\n" not in text] == []
    for argument in inspect.signature(function).parameters:
        assert f"{argument}" in text.partition("Args:")[2].partition("Returns:")[0]
