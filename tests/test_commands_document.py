"""The reference of the commands, which the site is given, has the options that ``--help`` shows."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

SOURCE = Path(__file__).parents[1] / "docs" / "commands_reference.py"
SPEC = importlib.util.spec_from_file_location("commands_reference", SOURCE)
assert SPEC is not None and SPEC.loader is not None
REFERENCE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(REFERENCE)


@pytest.mark.parametrize("tool", REFERENCE.APPS)
def test_each_command_has_the_options_of_its_help(tool: str) -> None:
    app = importlib.import_module(REFERENCE.APPS[tool]).app
    sections = REFERENCE.commands_of(tool).split(f"### {tool} ")[1:]
    assert len(sections) == len(app.registered_commands) > 4
    for section in sections:
        name, _, text = section.partition("\n")
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        lines = re.findall(r"^│[ *]*(--[a-z][^<│]*)", shown, re.MULTILINE)
        expected = {option for line in lines for option in re.findall(r"--[a-z][\w-]*", line)}
        rows = re.findall(r"^\| (`-.*?) \|", text, re.MULTILINE)
        found = {option for row in rows for option in re.findall(r"--[a-z][\w-]*", row)}
        assert found == expected - {"--help"}, name
