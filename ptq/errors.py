"""The one exception that means: the input is at fault, and this is how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input. The message gives the value, the rule and the way out; a command prints it without a
    traceback.
    """


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'comq'?` when something known is near `word`, else the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
