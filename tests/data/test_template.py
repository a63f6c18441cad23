import pytest

from videonsa_jax.data import template
from videonsa_jax.data.template import TemplateError, render_template


def test_what_chat_templates_use():
    source = (
        "{%- for message in messages if message.role != 'tool' %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ loop.length }}{{ loop.last }} {{ message.role ~ ':' + message.content | trim }}\n{% endfor %}\n"
        "{{ {'b': '<é>', 'a': 1} | tojson }} {{ 7 % 2 }} {{ 'x' * 2 }} {{ 'ab'.replace('a', 'cc') }}"
    )
    messages = [{"role": role, "content": f" {role} "} for role in ("user", "tool", "assistant", "user")]
    assert render_template(source, {"messages": messages}) == (
        '3False user:user\n3False assistant:assistant\n{"b": "<é>", "a": 1} 1 xx ccb'
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99) %}{% for j in range(99) %}{{ range(9) }}{% endfor %}{% endfor %}",
    ],
)
def test_endless_templates(monkeypatch, source):
    monkeypatch.setattr(template, "MAX_STEPS", 1000)
    with pytest.raises(TemplateError, match="did not end within 1000 steps"):
        render_template(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(9999) %}{{ text }}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ text.ljust(10 ** 9) }}",
        "{{ text.replace('a', text) }}",
    ],
)
def test_long_values(source):
    with pytest.raises(TemplateError, match=r"makes a value of [0-9]+ characters, expected 4000000 at most"):
        render_template(source, {"text": "a" * 3000})


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ '%999999d' % 1 }}", "formats with '%999999d'"),
        ("{{ '{:999999}'.format(1) }}", "formats with"),
        ("{{ 1 | center(9) }}", "No filter named 'center'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed: maximum recursion"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ messages[0].content }}", "failed: list object has no element 0"),
        ("{% for i in range(10 ** 7) %}{% endfor %}", "failed: Range too big"),
        ("{{ raise_exception('no') }}", "the chat template says: no"),
    ],
)
def test_failing_templates(source, sentence):
    with pytest.raises(TemplateError, match=sentence):
        render_template(source, {"messages": []})
