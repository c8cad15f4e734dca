"""Durations and sizes as an operator writes them: `30 s`, `14 d`, `16 MiB`; a bare number is in the unit that the key
names.

Invariant: what comes out is seconds (float) or bytes (int), finite and not negative.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Final

from pydantic import BeforeValidator

SECONDS_PER_UNIT: Final = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}
BYTES_PER_UNIT: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_seconds(value: object) -> float:
    """`30`, `"30"`, `"30 s"`, `"1.5h"` in seconds. Raises ValueError."""
    return _quantity(value, SECONDS_PER_UNIT, "s")


def parse_bytes(value: object) -> int:
    """`4096`, `"16 MiB"`, `"1.5 GiB"` in bytes. Raises ValueError, also for what is not a whole number of bytes."""
    size = _quantity(value, BYTES_PER_UNIT, "B")
    if size != int(size):
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return int(size)


Seconds = Annotated[float, BeforeValidator(parse_seconds)]
"""A duration. The key's name ends in _seconds."""

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""A size. The key's name ends in _bytes."""


def _quantity(value: object, units: dict[str, float] | dict[str, int], default_unit: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        quantity = _as_float(value)
    else:
        found = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        unit = (found[2] or default_unit) if found else ""
        if found is None or unit not in units:
            raise ValueError(f"{value!r} is not a number with one of the units {', '.join(units)}")
        quantity = float(found[1]) * units[unit]
    if not math.isfinite(quantity) or quantity < 0:
        raise ValueError(f"{value!r} must be finite and not negative")
    return quantity


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
