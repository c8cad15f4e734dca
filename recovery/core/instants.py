"""Instants as text and back: RFC 3339 in UTC with as many digits as it takes: what is printed can be typed in."""

from __future__ import annotations

import datetime
import re
from typing import Final

_INSTANT: Final = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)")


def instant_text(instant_ns: int) -> str:
    """Nanoseconds since the Unix epoch as 2026-11-20T09:00:00.25Z."""
    seconds, nanoseconds = divmod(instant_ns, 10**9)
    moment = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=seconds)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def parse_instant(text: str) -> int | None:
    """RFC 3339, with its offset from UTC, in nanoseconds since the Unix epoch; None for anything else."""
    found = _INSTANT.fullmatch(text.strip())
    if found is None:
        return None
    date, time_of_day, fraction, offset = found.groups()
    try:
        moment = datetime.datetime.fromisoformat(f"{date}T{time_of_day}{offset.upper()}")
    except ValueError:
        return None
    since_epoch = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    seconds = since_epoch.days * 86400 + since_epoch.seconds
    return seconds * 10**9 + int((fraction or "0").ljust(9, "0"))
