"""What a user is told of a data set that cannot be had."""

from __future__ import annotations


class DataError(Exception):
    """A data set cannot be had; the message is one line that says what to do next."""


def one_line(error: Exception) -> str:
    """The kind of an error and its words, on one line, as a `DataError` quotes it."""
    return " ".join(f"{type(error).__name__}: {error}".split())
