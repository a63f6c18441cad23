"""Errors that a user can mend."""

import contextlib
from collections.abc import Iterator

from videonsa_jax.data.sources import DataError


class UsageError(Exception):
    """Something that the user can mend; its message is one sentence."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns what data, configs, files and unfinished features raise into a `UsageError`."""
    try:
        yield
    except (DataError, ValueError, OSError, NotImplementedError) as error:
        raise UsageError(str(error)) from error
