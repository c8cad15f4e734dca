"""A dependency that nobody could be asked about is not called sound."""

from __future__ import annotations

from typing import Any

import pytest

from deploy import audit

SOUND: dict[str, Any] = {"name": "sound", "version": "1.0", "vulns": []}
BROKEN: dict[str, Any] = {
    "name": "broken",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["1.1"], "aliases": []}],
}
UNKNOWN: dict[str, Any] = {"name": "unknown", "skip_reason": "not found"}


def test_known_vulnerabilities_and_unknown_dependencies_are_counted() -> None:
    counts, found = audit.summary([SOUND, BROKEN, UNKNOWN])
    assert counts == {"dependencies": 3, "vulnerable": 1, "unknown": 1}
    assert found == ["broken 1.0: PYSEC-2026-1, mended in ['1.1']"]


@pytest.mark.parametrize(
    ("dependencies", "code"),
    [
        ([SOUND], audit.SOUND),
        ([SOUND, BROKEN], audit.VULNERABLE),
        ([BROKEN, UNKNOWN], audit.VULNERABLE),
        ([SOUND, UNKNOWN], audit.UNKNOWN),
        ([], audit.UNKNOWN),
    ],
)
def test_the_exit_code_is_never_better_than_what_was_asked(dependencies: list[dict[str, Any]], code: int) -> None:
    counts, _ = audit.summary(dependencies)
    assert audit.exit_code(counts) == code
