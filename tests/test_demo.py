"""The demo deletes nothing that it has not made."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEFAULT", tmp_path / "default")
    return module


def test_a_directory_of_the_user_is_refused_and_kept(demo: ModuleType, tmp_path: Path) -> None:
    mine = tmp_path / "home" / ".ssh" / "id"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for place in (tmp_path / "home", mine):
        with pytest.raises(SystemExit, match="exists with other content, expected a new directo"):
            demo.make_directory([str(place)])
    assert mine.read_text() == "mine"


def test_what_a_demo_made_is_kept_and_only_the_default_is_cleared(
    demo: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in ([str(tmp_path / "new" / "deep")], [str(tmp_path / "empty")], []):
        made = demo.make_directory(arguments)
        (made / "w8a8").mkdir()
        assert demo.make_directory(arguments) == made
        assert (made / "w8a8").exists() == bool(arguments)
