"""Where a defect is planted: an attribute of the product that must be there, replaced for the rest of the process.

A seam that has moved is an error, not a simulation that quietly finds nothing; `seam_calls` tells whether a planted
defect was ever reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

seam_calls: Final[Counter[str]] = Counter()
"""How often each planted defect was reached, by its seam."""


class SeamMoved(Exception):
    """The product changed: say here where the defect is to be planted now."""


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Puts make(what is there) in its place. Raises SeamMoved."""
    try:
        original = getattr(owner, name)
    except AttributeError as error:
        raise SeamMoved(f"{owner!r} has no {name} any more") from error
    setattr(owner, name, make(original))


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The defect itself, counted."""

    def call(*arguments: Any, **options: Any) -> Any:
        seam_calls[function.__qualname__] += 1
        return function(*arguments, **options)

    return call
