"""The commands that the documents show run, and print what is shown."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from diffusion_models import save_pipeline
from routed_models import DEEPSEEK, QWEN, save_routed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools" / "page_commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
ROUTED = {
    "DeepSeek-R1": {
        **DEEPSEEK,
        "vocab_size": 320,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 4,  # each token goes to all of them
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,  # the recipe knows it by its number
    },
    "Qwen3-30B-A3B": {
        **QWEN,
        "hidden_size": 128,
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "vocab_size": 320,
    },
}
SHOWN = [page for page in PAGES if TOOL.console_steps(page.read_text())]


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_what_commands_print_is_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    """20 CPU seconds for the quickstart: a dozen commands, each a process of its own."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    for command, shown in TOOL.console_steps(page.read_text()):
        printed, status = TOOL.run(command, tmp_path)
        assert not status, command
        assert TOOL.comparable(command, printed) == TOOL.comparable(command, shown), command


def test_commands_for_models_of_the_reader_run(
    tiny_model: Callable[..., Path], calib_text: Path, tmp_path: Path
) -> None:
    """With a small model under the name that the pages use, each command once: 18 CPU seconds.

    A search for a perplexity is only planned: it quantizes the model up to eight times.
    """
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shape = {"hidden_size": 320, "intermediate_size": 320, "head_dim": 80}
    tokenizer = tiny_model("Qwen3-8B", layers=1, **shape) / "tokenizer.json"
    for name, raw in ROUTED.items():
        shutil.copy(tokenizer, save_routed(tmp_path / name, raw))
    save_pipeline(tmp_path / "Wan2.2-T2V-A14B-Diffusers", transformer="wan", transformer_2="wan")
    text = calib_text.read_text()
    (tmp_path / "other.txt").write_text(text)
    question = {"prompt": text[:40], "choices": ["fox", "wizard"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}))
    commands = dict.fromkeys(
        command for page in PAGES for command in TOOL.shell_commands(page.read_text())
    )
    assert len(commands) > 10
    for command in commands:
        small = " --samples 2 --seq-len 48" if "--calib" in shlex.split(command) else ""
        planned = " --dry-run" if "--max-ppl-increase" in command else ""
        printed, status = TOOL.run(command + small + planned, tmp_path)
        assert not status, f"{command}: {printed}"


def test_the_first_recipe_is_the_file_that_its_commands_name() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    recipe = (ROOT / "examples" / "recipe.yaml").read_text().split("\n", 1)[1]  # but its comment
    assert f"```yaml\n{recipe}```" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_programs_are_public(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if "import " in block:
            ast.parse(block)
        for package, name in re.findall(
            r"^.*\b(ms_quant|sparse_compress)\.([a-z_]+)\(", block, re.M
        ):
            assert name in importlib.import_module(package).__all__, name
