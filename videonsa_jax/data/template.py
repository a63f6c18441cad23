"""Chat templates: Jinja source of a model folder, rendered in a sandbox whose work is bounded.

Jinja's own sandbox keeps a template from reaching Python's internals, but not from looping. Here every pass of a loop
and every call counts as one step, and values have a largest size, so that a template that does not end by itself ends
in an error.
"""

import contextvars
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000
MAX_CHARACTERS = 4_000_000

# Filters that make long values out of short ones.
_UNBOUNDED_FILTERS = ("center", "format", "indent", "urlize", "wordwrap", "xmlattr")
_WIDE_FORMAT = re.compile(r"[0-9]{5}|\*")

_steps: contextvars.ContextVar[Iterator[int]] = contextvars.ContextVar("steps of the template being rendered")


class TemplateError(ValueError):
    """A template that cannot be rendered: one sentence says why."""


def _step() -> None:
    if next(_steps.get()) >= MAX_STEPS:
        raise TemplateError(f"the chat template did not end within {MAX_STEPS} steps, expected it to end by itself")


def _bounded_length(length: int) -> None:
    if length > MAX_CHARACTERS:
        raise TemplateError(
            f"the chat template makes a value of {length} characters, expected {MAX_CHARACTERS} at most"
        )


def _bounded_value[Value](value: Value) -> Value:
    if isinstance(value, str | list | tuple):
        _bounded_length(len(value))
    return value


def _counted_items(items: Iterable[object]) -> Iterator[object]:
    for item in items:
        _step()
        yield item


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template says: {message}")


def _to_json(value: object, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self):
        # trim_blocks, lstrip_blocks and loop controls as transformers renders chat templates.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        for name in _UNBOUNDED_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _to_json, "counted_items": _counted_items, "bounded_value": _bounded_value}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = self._filtered(loop.iter, "counted_items")
        for parent in [tree, *tree.find_all(nodes.Node)]:
            for field, value in parent.iter_fields():
                if isinstance(value, nodes.Concat):
                    setattr(parent, field, self._filtered(value, "bounded_value"))
                elif isinstance(value, list):
                    value[:] = [
                        self._filtered(node, "bounded_value") if isinstance(node, nodes.Concat) else node
                        for node in value
                    ]
        return tree

    def _filtered(self, node: nodes.Expr, name: str) -> nodes.Filter:
        filtered = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        filtered.set_environment(self)
        return filtered

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        counted = (left, right) if isinstance(right, int) else (right, left)
        if operator == "*" and isinstance(counted[0], str | list | tuple) and isinstance(counted[1], int):
            _bounded_length(len(counted[0]) * counted[1])
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            _bounded_length(left.bit_length() * (right if operator == "**" else 1) + right.bit_length())
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise TemplateError(f"the chat template formats with {left[:40]!r}, expected widths below 10000")
        return _bounded_value(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
                _bounded_length(len(owner) + owner.count(args[0]) * len(args[1]))
            if name in ("format", "format_map") and _WIDE_FORMAT.search(owner):
                raise TemplateError(f"the chat template formats with {owner[:40]!r}, expected widths below 10000")
            _bounded_length(max((arg for arg in args if isinstance(arg, int)), default=0))
        return _bounded_value(super().call(context, function, *args, **kwargs))


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _BoundedEnvironment().from_string(source)


def render_template(source: str, variables: Mapping[str, object]) -> str:
    """Renders a chat template.

    Args:
      source: Jinja source; beside Jinja's own it may use `raise_exception`, `strftime_now`, `tojson` and loop controls.
      variables: what the template sees.

    Raises:
      TemplateError: the template is malformed, fails, is refused by the sandbox, takes more than `MAX_STEPS` steps or
        makes a text of more than `MAX_CHARACTERS` characters.
    """
    token = _steps.set(iter(range(MAX_STEPS + 1)))
    try:
        pieces, length = [], 0
        for piece in _compiled(source).generate(**variables):
            length += len(piece)
            _bounded_length(length)
            pieces.append(piece)
        return "".join(pieces)
    except TemplateError:
        raise
    # A template can raise anything: it divides, indexes, recurses, adds a text to a number.
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise TemplateError(f"the chat template failed: {error or type(error).__name__}") from error
    finally:
        _steps.reset(token)
