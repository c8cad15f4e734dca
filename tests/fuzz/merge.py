"""The smallest inputs that reach what all do: `python -m tests.fuzz.merge TARGET -set_cover_merge=1 INTO FROM…`."""

from __future__ import annotations

import importlib
import shlex
import sys

from tests.fuzz.target import Target
from tests.fuzz.worker import PACKAGES, quiet


def main() -> None:
    import atheris  # type: ignore[import-not-found]

    name, *arguments = sys.argv[1:]
    with atheris.instrument_imports(include=PACKAGES):
        registry = importlib.import_module("tests.fuzz.registry")
    quiet()
    target: Target = registry.TARGETS[name]

    def run(data: bytes) -> None:
        try:
            target.run(data)
        except target.refusals:
            pass

    # why: libFuzzer merges in a child process, which it starts by a shell and this text
    command = f"{shlex.quote(sys.executable)} -m tests.fuzz.merge {name}"
    atheris.Setup([command, *arguments], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
