# ruff: noqa: E501 - one template a line
"""Hostile chat templates: whatever they ask for, they are stopped soon and reach nothing of Python."""

import time

import pytest

from tritium.errors import CheckpointError, RequestError
from tritium.text import template_sandbox
from tritium.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "hello"}

LOOPS = {
    "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a lazy loop": "{% set s = 'x' * 2000 %}{% for i in s %}{% for j in s | map('upper') %}{% endfor %}{% endfor %}",
    "a recursive macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macros without loops": "{% macro a() %}{% endmacro %}{% macro b() %}"
    + "{{ a() }}" * 200
    + "{% endmacro %}{% macro c() %}"
    + "{{ b() }}" * 200
    + "{% endmacro %}"
    + "{{ c() }}" * 200,
}
MEMORY = {
    "a repeated string": "{{ 'x' * 10**9 }}",
    "a repeated list": "{{ [1] * 10**9 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power of text length": "{% set n = 10 ** 64 %}{% set n = n ** 64 %}{% set n = n ** 64 %}{% set n = n ** 64 %}{{ n }}",
    "doubling with +": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling with ~": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "shared lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "shared lists as JSON": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s | tojson }}",
    "output in a loop": "{% set s = 'x' * 4000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "a block in a loop": "{% set s = 'x' * 4000000 %}{% set t %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    "center": "{{ 'x' | center(10 ** 9) }}",
    "indent": "{{ ('x\n' * 9000) | indent(10 ** 9) }}",
    "JSON indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "replace": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "replace filter": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "join": "{{ ('x' * 100000).join(range(100000) | map('string') | list) }}",
    "join filter": "{{ range(100000) | list | join('x' * 100000) }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a % of an argument's width": "{{ '%*d' % (1000000000, 1) }}",
    "a wide format": "{{ '{:1000000000}'.format(1) }}",
    "a format of an argument's width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "many fields": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "lorem ipsum": "{{ lipsum(n=100000) }}",
}


@pytest.mark.parametrize("name", LOOPS | MEMORY)
def test_a_template_without_end_or_measure_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_TURNS", 100_000)
    start = time.thread_time()  # the work: beside a loaded machine's other work a second can last five
    with pytest.raises((RequestError, CheckpointError), match="chat template"):
        ChatTemplate((LOOPS | MEMORY)[name]).render([USER])
    assert time.thread_time() - start < 3


def test_a_template_has_only_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    source = (
        "{% for i in range(900) %}{% for j in range(900) %}{{ messages | tojson | length }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(RequestError, match=r"stopped: it needs more than 0\.2 seconds"):
        ChatTemplate(source).render([USER])


def test_a_template_longer_than_any_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has 262145 characters; at most 262144 are allowed"):
        ChatTemplate("x" * ((1 << 18) + 1)).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__ }}",
        "{{ ''.format.__globals__ }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ (''|attr('format'))('{0.__class__}') }}",
        "{{ namespace(__class__=1).__class__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ dict.__subclasses__() }}",
        "{{ cycler.__init__ }}",
    ],
)
def test_a_template_cannot_reach_python(source: str) -> None:
    try:
        text = ChatTemplate(source).render([USER])
    except (RequestError, CheckpointError):
        return
    assert "<" not in text and "class" not in text, text
