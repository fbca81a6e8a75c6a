"""The plugin where vLLM is absent or another than it knows; tests/vllm has those with vLLM."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType

import pytest

from sparse_compress import vllm_plugin


@pytest.fixture(autouse=True)
def forget() -> None:
    vllm_plugin._warn.cache_clear()


def test_without_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An exception here would stop vLLM whatever it serves: one warning, and on."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader", None)
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
        vllm_plugin.register()
    assert len(caplog.records) == 1
    assert "sparse_quant of ms-quant is not available here (" in caplog.text


def test_another_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    loaders = ModuleType("vllm.model_executor.model_loader")
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, loaders.__name__, loaders)
    vllm_plugin.register()
    assert "ImportError: cannot import name 'register_model_loader'" in caplog.text


def test_nothing_heavy_is_imported(package_environment: dict[str, str]) -> None:
    """The proof, the checks and the plugin itself need no framework."""
    modules = (
        "sparse_compress.vllm_plugin.loader, sparse_compress.serve.check, ms_quant.serve.check"
    )
    script = (
        f"import sys, {modules}\n"
        "print([m for m in ('vllm', 'torch', 'mindspore') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(
        command, env=package_environment, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == "[]", found.stderr
