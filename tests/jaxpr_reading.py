"""What a traced function consists of."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import jaxprs_in_params


def every_equation(jaxpr: Any) -> Iterator[Any]:
    """The equations of a (closed) jaxpr and of all jaxprs inside it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from every_equation(inner)
