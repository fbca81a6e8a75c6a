"""Templates that count for ever, take all memory, or try to get out: one sentence, and soon."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from ms_quant.data import template_process
from ms_quant.data.template_process import Renderer, render_template

NAMES = {"messages": [{"role": "user", "content": "hello"}]}
TOO_MUCH = r"it takes more than 0\.3 s or 256 MB"
REFUSED = rf"{TOO_MUCH}|[Ll]imit|too (big|large|many)|range|writes more"
LONG = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "a power": "{{ (10**10)**(10**8) }}",
    "a power of constants in a condition": "{% if 9**(9**9) %}{% endif %}",
    "a product of text": "{{ 'a' * (3 * 10**9) }}",
    "a product of a list": "{{ ([0] * 10**9) | length }}",
    "a width": "{{ '%3000000000d' % 1 }}",
    "a width of format": "{{ '{:3000000000}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(3 * 10**9) }}",
    "rjust": "{{ 'a'.rjust(3 * 10**9) }}",
    "zfill": "{{ 'a'.zfill(3 * 10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(2**31 - 1) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join": "{{ ('b' * 99999).join('a' * 99999) }}",
    "center": "{{ 'a' | center(3 * 10**9) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(10**7) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "range to a list": "{% set x = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set x.l = x.l + range(99999) | list %}{% endfor %}",
    "doubling in a namespace": "{% set n = namespace(t='aaaa') %}{% for i in range(64) %}"
    "{% set n.t = n.t + n.t %}{% endfor %}{{ n.t | length }}",
    "doubling by itself": "{% set n = namespace(l=[1]) %}{% for i in range(64) %}"
    "{% set n.l = n.l * 2 %}{% endfor %}",
    "recursion of a macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}"
    "{% macro g(n) %}{% if n %}{{ g(n - 1) }}{{ g(n - 1) }}{% endif %}{% endmacro %}{{ g(40) }}",
    "json": "{{ ([[0] * 9999] * 99999) | tojson | length }}",
    "written": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def renderer():
    """A process with less, so that the tests end soon."""
    with pytest.MonkeyPatch.context() as patch:
        start = template_process.START.replace(
            "import main;",
            "import main; from ms_quant.data "
            "import template_process as p; p.CPU_SECONDS = 0.3; p.MEMORY_BYTES = 256 << 20;",
        )
        patch.setattr(template_process, "START", start)
        patch.setattr(template_process, "CPU_SECONDS", 0.3)
        patch.setattr(template_process, "MEMORY_BYTES", 256 << 20)
        yield Renderer()


@pytest.mark.parametrize("template", LONG.values(), ids=LONG)
def test_what_takes_too_much(renderer, template):
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with pytest.raises(
        ValueError, match=rf"{TOO_MUCH}|[Ll]imit|too (big|large|many)|range|writes more"
    ):
        renderer.render(template, NAMES)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 5 and time.monotonic() - started < 40
    # In KB, of any process that has ended: that of an earlier test may have been larger.
    assert after.ru_maxrss <= max(before.ru_maxrss, 700 << 10)
    assert renderer.render("{{ messages[0].content }}", NAMES) == "hello"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__self__.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% set x = messages.append(1) %}",
        "{{ self._TemplateReference__context.environment.globals }}",
        "{{ lipsum(5) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_gets_out(template):
    """Refused, or nothing is there to be written."""
    try:
        found = render_template(template, NAMES)
    except ValueError as error:
        assert str(error)
    else:
        assert "subclass" not in found and "root:" not in found and "uid=" not in found


def test_one_process_serves_all_and_is_replaced(renderer):
    assert renderer.render("{{ messages | length }}", NAMES) == "1"
    first = renderer.process
    for number in range(50):
        assert renderer.render("{{ n }}", {"n": number}) == str(number)
    assert renderer.process == first
    with pytest.raises(ValueError, match="no words"):
        renderer.render("{{ raise_exception('no words') }}", {})
    assert renderer.process == first
    os.kill(first, 9)
    for _ in range(2):
        try:
            assert renderer.render("{{ 1 }}", {}) == "1"
        except ValueError:  # it was asked before the system had ended it
            continue
    assert renderer.process != first


def test_all_texts_come_through():
    odd = "a\x00b \ud800 日本 \U0001f389 \r\n"
    found = render_template(
        "{{ t }}|{{ n | tojson }}", {"t": odd, "n": {"b": [1.5, None], "a": odd[:1]}}
    )
    assert found == odd + '|{"b": [1.5, null], "a": "a"}'


def test_many_ask_at_once():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: render_template("{{ i * 2 }}", {"i": i}), range(100)))
    assert found == [str(2 * i) for i in range(100)]


def test_a_hostile_model_is_told_in_one_sentence(tiny_model, monkeypatch):
    from ms_quant.data.tokenizer import load_tokenizer
    from ms_quant.errors import BadFileError

    directory: Path = tiny_model()
    (directory / "chat_template.jinja").write_text("{{ 'a' * (3 * 10**9) }}")
    with pytest.raises(BadFileError, match=r"model: the chat template failed \(it takes more than"):
        load_tokenizer(directory).render(NAMES["messages"])
