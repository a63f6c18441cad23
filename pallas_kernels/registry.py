"""Which implementation of an operation runs.

Every operation registers its implementations by name. A caller asks for one by name, or leaves the choice to the
device; a kernel says that it does not cover a case by raising NotImplementedError while it is traced.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import jax

from pallas_kernels.measured_order import measured_order

Name = Literal["xla", "reference", "mosaic_gpu", "mosaic_tpu", "triton", "triton_token_major"]
Implementation = str | Mapping[str, str | None] | None

NAMES: tuple[str, ...] = get_args(Name)

_PREFERENCE: dict[str, tuple[str, ...]] = {
    # Triton's kernels have run on Hopper only: elsewhere they are there by name, until a measured order says more.
    "gpu": ("mosaic_gpu", "xla"),
    "gpu 9.0": ("mosaic_gpu", "triton", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
}
_registered: dict[str, dict[str, Callable[..., Any]]] = {}
_warned: set[tuple[str, str]] = set()


def register(operation: str, **implementations: Callable[..., Any]) -> None:
    """Adds implementations of an operation, under their names.

    Args:
      operation: the operation's name.
      **implementations: functions that share the operation's signature, less `implementation`.

    Raises:
      ValueError: a name is not one of `NAMES`.
    """
    for name in implementations:
        _check_name(name)
    _registered.setdefault(operation, {}).update(implementations)


def available(operation: str) -> tuple[str, ...]:
    """Names of the implementations that exist of an operation."""
    return tuple(_registered[operation])


def check(implementation: Implementation) -> None:
    """Raises where `implementation` holds a name or an operation that does not exist.

    Args:
      implementation: None, a name, or a dict from operation to name.

    Raises:
      ValueError: an unknown implementation or operation, with the known ones.
    """
    if implementation is None or isinstance(implementation, str):
        implementation = {operation: implementation for operation in _registered}
    for operation, name in implementation.items():
        if operation not in _registered:
            raise ValueError(
                f"implementation names the operation {operation!r}, expected one of {', '.join(sorted(_registered))}"
            )
        if name is not None:
            _check_name(name)


def call(operation: str, implementation: Implementation, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation with the implementation asked for, or with the best one for the device.

    Args:
      operation: the operation's name.
      implementation: a name runs that implementation or raises. None runs the device's first choice that covers the
        case (the fastest measured, where the device is in `measured_order.json`), with one warning per process when
        that is not the first. A dict gives one of the two per operation;
        an operation it leaves out gets None.
      *args: the operation's arrays.
      **kwargs: the operation's keyword arguments.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: an unknown implementation or operation.
      NotImplementedError: the named implementation does not exist for this operation or does not cover the case.
    """
    check(implementation)
    name = implementation.get(operation) if isinstance(implementation, Mapping) else implementation
    functions = _registered[operation]
    if name is not None:
        if name not in functions:
            raise NotImplementedError(f"{operation} has no implementation {name!r}, only {', '.join(functions)}")
        return functions[name](*args, **kwargs)

    *kernels, last = _by_preference(operation)
    for name in kernels:
        try:
            return functions[name](*args, **kwargs)
        except NotImplementedError as reason:
            if (operation, name) not in _warned:
                _warned.add((operation, name))
                warnings.warn(f"{operation}: {name} does not cover this call ({reason}); falling back", stacklevel=3)
    return functions[last](*args, **kwargs)


def first_choice(operation: str, implementation: Implementation) -> str:
    """The implementation that `call` tries first.

    Args:
      operation: the operation's name.
      implementation: as in `call`.

    Returns:
      Its name.
    """
    name = implementation.get(operation) if isinstance(implementation, Mapping) else implementation
    return name or _by_preference(operation)[0]


def first_choice_of_all(whole: str, operations: Iterable[str], implementation: Implementation) -> str | None:
    """The one implementation that all parts of a whole would try first, so that they may be fused.

    Args:
      whole: name under which the whole was measured; its own order counts where nothing is named.
      operations: its parts.
      implementation: as in `call`.

    Returns:
      Its name; None where the parts' differ.
    """
    measured = _measured(whole) if implementation is None else ()
    choices = set(measured[:1]) or {first_choice(operation, implementation) for operation in operations}
    return choices.pop() if len(choices) == 1 else None


def _measured(operation: str) -> tuple[str, ...]:
    return measured_order(jax.devices()[0].device_kind, operation)


def _by_preference(operation: str) -> list[str]:
    """What was measured on this device first; nothing after "xla", which covers everything."""
    backend = jax.default_backend()
    capability = getattr(jax.devices()[0], "compute_capability", None)
    names = _PREFERENCE.get(f"{backend} {capability}") or _PREFERENCE.get(backend, ("xla",))
    measured = _measured(operation)
    in_order = [*measured, *(name for name in names if name not in measured)]
    available = [name for name in in_order if name in _registered[operation]]
    return available[: available.index("xla") + 1]


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"implementation is {name!r}, expected None or one of {', '.join(NAMES)}")
