"""The documentation site: `make docs` builds it into build/site.

What a page has from elsewhere stands in it as a mark, a comment of one line: the commands of a
program, the public names of a package, another file of the repository, the list of pages.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

sys.path.insert(0, str(Path(__file__).parent))
from commands_reference import commands_of

ROOT = Path(__file__).parents[1]
PAGES = {  # files elsewhere in the repository that are pages here
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "models/stdlib-qwen3-6m/README.md": "bundled_model.md",
    "models/stdlib-qwen3-moe/README.md": "bundled_qwen3_moe.md",
    "models/stdlib-deepseek/README.md": "bundled_deepseek.md",
    "models/moving-shapes-dit/README.md": "bundled_video_dit.md",
}
CONTENTS = {
    "Start": """
        Quickstart <quickstart>
        Choose a scheme and an algorithm <choose>
    """,
    "Guides": """
        Your network in MindSpore <networks>
        Recipes <recipes>
        Sparse compression <sparse>
        Evaluation <evaluation>
        Tasks <tasks>
        A report on one page <report>
        Try it before the board <server>
        Find what hurts <analysis>
        Mixed precision <mixed_precision>
        Experts and latent attention <experts>
        Attention and diffusion <attention>
        Serve <serving>
        Concepts and glossary <concepts>
    """,
    "What you bring": """
        Models <models>
        Directories <sources>
        Calibration data <data>
        Checkpoints that others made <others>
    """,
    "Reference": """
        Commands <commands>
        Python API <python>
        Schemes, formats, runtimes <formats>
        Algorithms <algorithms>
        Jobs and resume <jobs>
        Numerics <numerics>
        Accuracy <accuracy>
    """,
    "Format specifications": """
        golden-stick <golden_stick_format>
        ascend <ascend_format>
        compressed-tensors <compressed_tensors_format>
        mindie-sd <mindie_sd_format>
        vllm-omni <vllm_omni_format>
        W8A8SC <w8a8sc>
        UNZIP <unzip_format>
    """,
    "Internals": """
        What is verified <status>
        Rate-distortion rounding <rate_distortion>
        Native kernels <kernels>
        Benchmarks <benchmarks>
        The bundled model <bundled_model>
        The bundled Qwen3-MoE <bundled_qwen3_moe>
        The bundled DeepSeek-V3 <bundled_deepseek>
        The bundled video transformer <bundled_video_dit>
        Contributing <contributing>
        Changes <changes>
    """,
}
MARK = re.compile(r"^<!-- (commands|names|file|contents) of (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")

project = "ms-quant"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
highlight_language = "text"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = "ms-quant"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # a Cell has what every Cell of MindSpore has
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Inputs", "Outputs", "Supported Platforms"]


def setup(app: Sphinx) -> None:
    app.add_lexer("hex", TextLexer)
    app.connect("source-read", fill_marks)


def fill_marks(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = MARK.sub(lambda mark: MADE[mark[1]](mark[2]), relink(content[0], Path("docs")))


def names_of(package: str) -> str:
    module = importlib.import_module(package)
    parts = [directive(package, name, getattr(module, name)) for name in module.__all__]
    return "\n".join(["```{eval-rst}", *parts, "```"])


def directive(package: str, name: str, value: Any) -> str:
    path = f"{package}.{name}"
    if inspect.isclass(value):
        made = stringify_signature(
            signature(value.__init__, bound_method=True), unqualified_typehints=True
        )
        shown = "" if issubclass(value, Exception | tuple) else made.removesuffix(" -> None")
        return f".. autoclass:: {path}{shown}\n   :members:\n"
    if inspect.isroutine(value):
        return f".. autofunction:: {path}\n"
    names = ", ".join(f"``{key}``" for key in value) if isinstance(value, dict) else ""
    return f".. py:data:: {path}\n   :type: {type(value).__name__}\n\n   {names}\n"


def file_of(name: str) -> str:
    return relink((ROOT / name).read_text(), Path(name).parent)


def relink(text: str, place: Path) -> str:
    """Links of a file that lies in `place` to files of the repository, as links of pages."""

    def page(match: re.Match[str]) -> str:
        path = (ROOT / place / match[0]).resolve()
        if not (path.is_relative_to(ROOT) and path.exists()):
            return match[0]
        inside = path.relative_to(ROOT).as_posix()
        return PAGES.get(inside, os.path.relpath(inside, "docs"))

    return LINK.sub(page, text)


def contents_of(name: str) -> str:
    assert name == "site"
    return "\n".join(
        f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{inspect.cleandoc(pages)}\n```\n"
        for caption, pages in CONTENTS.items()
    )


MADE = {"commands": commands_of, "names": names_of, "file": file_of, "contents": contents_of}
