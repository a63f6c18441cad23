"""`--set path=value`: typed changes to a tree of frozen dataclasses."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(getattr(kind, "__value__", kind)) is tuple


def _describe(kind: Any) -> str:
    if isinstance(kind, typing.TypeAliasType):
        return _describe(kind.__value__)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        if arguments[-1] is not ... and len(set(arguments)) > 1:
            return ", then ".join(map(_describe, arguments))
        items = "any number of" if arguments[-1] is ... else str(len(arguments))
        separator = "semicolon" if _is_tuple(arguments[0]) else "comma"
        return f"{items} {separator}-separated values, each {_describe(arguments[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if kind is types.NoneType:
        return "none"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(kind, str(kind))


def _parts(text: str, kinds: tuple[Any, ...]) -> list[str]:
    if _is_tuple(kinds[0]):
        return text.split(";")
    if kinds[0] is str and kinds[-1] is not ...:  # a text may have commas and brackets of its own
        return text.rsplit(",", len(kinds) - 1)
    return text.strip("()[] ").split(",")


def _parse(text: str, kind: Any) -> Any:
    """Reads a value of a type; raises a ValueError without a message if the text is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, typing.TypeAliasType):
        return _parse(text, kind.__value__)
    if origin is Literal:
        matches = [argument for argument in arguments if str(argument) == text]
        if not matches:
            raise ValueError
        return matches[0]
    if origin is tuple:
        parts = [part.strip() for part in _parts(text, arguments) if part.strip()]
        kinds = [arguments[0]] * len(parts) if arguments[-1] is ... else arguments
        if len(kinds) != len(parts):
            raise ValueError
        return tuple(_parse(part, part_kind) for part, part_kind in zip(parts, kinds, strict=True))
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            try:
                return _parse(text, argument)
            except ValueError:
                continue
        raise ValueError
    if kind is types.NoneType and text.lower() == "none":
        return None
    if kind is bool and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    raise ValueError


def _fields(config: Any, prefix: str = "") -> dict[str, tuple[Any, bool]]:
    """Every path below a config with its type, and whether it is a group of fields rather than a value."""
    paths = {}
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        path, value = prefix + field.name, getattr(config, field.name)
        is_group = dataclasses.is_dataclass(value)
        paths[path] = (kinds[field.name], is_group)
        if is_group:
            paths |= _fields(value, f"{path}.")
    return paths


def _replace(config: Any, changes: Mapping[str, Any]) -> Any:
    own: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    own |= {name: _replace(getattr(config, name), deeper) for name, deeper in below.items() if name not in own}
    return dataclasses.replace(config, **own)


def apply_overrides[Config](config: Config, overrides: Iterable[str]) -> Config:
    """A config with some fields changed, all at once.

    Args:
      config: frozen dataclass, nested.
      overrides: "dotted.path=value" each; of two with one path the later counts.

    Returns:
      The changed copy.

    Raises:
      ValueError: no "=", no such field (the nearest ones are named), a value of the wrong type, or values that do not
        fit together.
    """
    fields = _fields(config)
    changes = {}
    for override in overrides:
        path, separator, text = override.partition("=")
        path, text = path.strip(), text.strip()
        if not separator:
            raise ValueError(f"--set {override!r}: expected path=value")
        if path not in fields:
            near = difflib.get_close_matches(path, fields, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else f"; the groups are {', '.join(_groups(fields))}"
            raise ValueError(f"--set {override!r}: there is no field {path!r}{hint}")
        kind, is_group = fields[path]
        if is_group and not (type(None) in typing.get_args(kind) and text.lower() == "none"):
            below = [name for name in fields if name.startswith(f"{path}.")]
            raise ValueError(f"--set {override!r}: {path} is a group, set one of its fields: {', '.join(below)}")
        try:
            changes[path] = _parse(text, kind)
        except ValueError:
            raise ValueError(f"--set {override!r}: {text!r} is not what {path} expects: {_describe(kind)}") from None
    return _replace(config, changes)


def _groups(fields: Mapping[str, tuple[Any, bool]]) -> list[str]:
    return [path for path, (_, is_group) in fields.items() if is_group]
