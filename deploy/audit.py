"""`python -m deploy.audit`: whether any locked dependency has a known vulnerability, as far as that can be asked here.

Invariant: a dependency that nobody could be asked about is never counted as sound. Exits 1 on a known vulnerability,
and 3 when some or all could not be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

LOCK: Final = Path(__file__).parent.parent / "requirements.lock"
AUDIT_SECONDS_MAX: Final = 300
SOUND, VULNERABLE, UNKNOWN = 0, 1, 3


def main() -> int:
    """Prints one JSON line with the counts, and on stderr what was found."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(LOCK), "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_SECONDS_MAX)
        counts, found = summary(json.loads(done.stdout)["dependencies"])
    except (subprocess.TimeoutExpired, json.JSONDecodeError, KeyError) as error:
        print(f"not audited: the vulnerability service could not be asked ({type(error).__name__})", file=sys.stderr)
        return UNKNOWN
    print(json.dumps(counts))
    for line in found:
        print(line, file=sys.stderr)
    if counts["unknown"]:
        print(f"not audited: {counts['unknown']} of {counts['dependencies']} dependencies", file=sys.stderr)
    return exit_code(counts)


def summary(dependencies: list[dict[str, Any]]) -> tuple[dict[str, int], list[str]]:
    """What pip-audit says of each dependency, as counts, and a line per known vulnerability."""
    unknown = sum("skip_reason" in dependency for dependency in dependencies)
    found = [
        f"{dependency['name']} {dependency['version']}: {fault['id']}, mended in {fault['fix_versions']}"
        for dependency in dependencies
        for fault in dependency.get("vulns", ())
    ]
    vulnerable = sum(bool(dependency.get("vulns")) for dependency in dependencies)
    return {"dependencies": len(dependencies), "vulnerable": vulnerable, "unknown": unknown}, found


def exit_code(counts: dict[str, int]) -> int:
    """Of a summary's counts. Nothing audited is UNKNOWN, not SOUND."""
    if counts["vulnerable"]:
        return VULNERABLE
    return UNKNOWN if counts["unknown"] or not counts["dependencies"] else SOUND


if __name__ == "__main__":
    sys.exit(main())
