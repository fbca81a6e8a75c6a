"""The tokenizer of a model directory and its chat template; one test for each defect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ms_quant.data.tokenizer import load_tokenizer
from ms_quant.errors import MsQuantError

WORDS = [f"w{i}" for i in range(20)] + ["user:", "assistant:"]
EOS, BOS, SIZE = len(WORDS), len(WORDS) + 1, len(WORDS) + 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A word-level tokenizer that would add a begin token, truncate and pad, if it were let."""
    directory = tmp_path / "model"
    directory.mkdir()
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>", "<s>"])
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    words.enable_truncation(4)
    words.enable_padding(length=4, pad_id=EOS, pad_token="</s>")
    words.save(str(directory / "tokenizer.json"))
    configure(directory)
    return directory


def configure(directory: Path, **changes: Any) -> None:
    config = {
        "eos_token": "</s>",
        "bos_token": {"content": "<s>"},
        "additional_special_tokens": ["<s>"],
        "chat_template": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config | changes))


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tokenizer_missing_or_broken(model: Path) -> None:
    put(model, "tokenizer.json", '{"model": 3}')
    with pytest.raises(MsQuantError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(model)
    (model / "tokenizer.json").unlink()
    with pytest.raises(
        MsQuantError, match=r"has no tokenizer, expected tokenizer\.json, or token ids"
    ):
        load_tokenizer(model)


def test_tokenizer_without_its_config(model: Path) -> None:
    (model / "tokenizer_config.json").unlink()
    loaded = load_tokenizer(model)
    assert (loaded.vocab_size, loaded.eos_id, loaded.templates) == (SIZE, None, None)
    assert loaded.encode("w1 w2 w3 w4 w5 w6").tolist() == [1, 2, 3, 4, 5, 6]
    assert loaded.decode(np.array([1, EOS, 2])) == "w1 w2"


USER = [{"role": "user", "content": "<b>"}]


def render(model: Path, template: Any, **kwargs: Any) -> str:
    configure(model, chat_template=template)
    return load_tokenizer(model).render(USER, **kwargs)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s><b></s>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<b>"}]'),  # no HTML escapes
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # blocks leave no white space
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),  # the same tokens on every day
        ("{{ tools is none }}{{ documents is none }}{{ nothing }}", "TrueTrue"),
        ("{% set n = namespace(i=1) %}{% set n.i = n.i + 1 %}{{ n.i }}", "2"),
        (
            "{{ {'b': 1, 'a': 'é'} | tojson(indent=1, sort_keys=true) }}",
            '{\n "a": "é",\n "b": 1\n}',
        ),
        ("{% if messages[0].reasoning_content is string %}x{% endif %}y", "y"),
        ("{{ additional_special_tokens | join }}", "<s>"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
    ],
)
def test_template(model: Path, template: Any, expected: str) -> None:
    assert render(model, template) == expected


def test_generation_prompt(model: Path) -> None:
    template = "u{% if add_generation_prompt %}a{% endif %}"
    assert render(model, template) == "u"
    assert render(model, template, add_generation_prompt=True) == "ua"


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_templates_by_name(model: Path) -> None:
    """As in transformers: with tools the one named so, where there is one."""
    configure(
        model,
        chat_template=[
            {"name": "tool_use", "template": "T{{ tools | length }}"},
            {"name": "default", "template": "D"},
        ],
    )
    assert load_tokenizer(model).render(USER) == "D"
    assert load_tokenizer(model).render(USER, tools=TOOLS) == "T1"
    more = model / "additional_chat_templates"
    more.mkdir()
    put(more, "tool_use.jinja", "other {{ tools[0].function.name }}")
    with pytest.raises(MsQuantError, match="the chat templates tool_use, expected one named def"):
        load_tokenizer(model).render(USER)
    put(model, "chat_template.jinja", "file")
    assert load_tokenizer(model).render(USER) == "file"
    assert load_tokenizer(model).render(USER, tools=TOOLS) == "other f"


def test_the_template_of_a_processor_counts_last(model: Path) -> None:
    put(model, "chat_template.json", json.dumps({"chat_template": "processor"}))
    assert load_tokenizer(model).render(USER) == "processor"
    assert render(model, "tokenizer") == "tokenizer"


def test_template_file_comes_first(model: Path) -> None:
    put(model, "chat_template.jinja", "from the file")
    assert render(model, "from the config") == "from the file"
    put(model, "chat_template.jinja", b"\xff")
    with pytest.raises(MsQuantError, match=r"chat_template\.jinja: not UTF-8"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template failed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.attribute }}", "is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "the chat template failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange too big"),
    ],
)
def test_template_that_fails(model: Path, template: str, message: str) -> None:
    with pytest.raises(MsQuantError, match=message):
        render(model, template)


def test_template_that_writes_too_much(model: Path) -> None:
    with pytest.raises(MsQuantError, match="writes more than 67108864 characters"):
        render(model, "{% for i in range(700) %}{{ 'a' * 100000 }}{% endfor %}")
