"""`make bpf`: compiles the agent's tracing programs, and packs them so that Python alone can load them.

The result depends on the sources, clang and bpftool, and on nothing of the machine that it was made on: no path, no
time, no kernel's types. It is committed, so that neither a user's machine nor a build of the packages needs a compiler.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from mobility_agent.tracking.bpf_skeleton import SKELETON_FILE, Skeleton

CLANG: Final = "clang-14"
"""Debian 12's. Another version makes other bytes, and then the test cannot say whether those committed are current."""
BPFTOOL: Final = ("bpftool", "/usr/sbin/bpftool")
SOURCE: Final = "block_writes.bpf.c"
SOURCES: Final = (SOURCE, "kernel_types.h")
_FLAGS: Final = (
    *("-g", "-O2", "-Wall", "-Werror", "-Wno-unused-function", "-Wno-unused-const-variable"),
    *("-target", "bpf", "-mcpu=v3", "-fdebug-compilation-dir=."),
)


def missing_tools() -> list[str]:
    """What compile_skeleton() needs and this machine has not, as Debian names its packages."""
    missing = [] if shutil.which(CLANG) else [CLANG]
    missing += [] if any(shutil.which(path) for path in BPFTOOL) else ["bpftool"]
    return missing + ([] if shutil.which("llvm-strip-14") else ["llvm-14"])


def compile_skeleton(directory: Path) -> bytes:
    """The skeleton of the sources in `directory`. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as temporary:
        compiled = Path(temporary) / "block_writes.o"
        subprocess.run([CLANG, *_FLAGS, "-c", SOURCE, "-o", str(compiled)], cwd=directory, check=True)
        subprocess.run(["llvm-strip-14", "-g", str(compiled)], check=True)
        bpftool = next(path for path in BPFTOOL if shutil.which(path))
        made = subprocess.run(
            [bpftool, "gen", "skeleton", "-L", str(compiled), "name", "block_writes"], check=True, capture_output=True
        )
    return parse_header(made.stdout.decode("ascii")).packed()


def parse_header(text: str) -> Skeleton:
    """A light skeleton's header, as bpftool writes it, without the C around what matters."""
    return Skeleton(
        data=_blob(text, "data"),
        instructions=_blob(text, "insns"),
        maps=tuple(dict.fromkeys(re.findall(r"struct bpf_map_desc (\w+);", text))),
        programs=tuple(dict.fromkeys(re.findall(r"struct bpf_prog_desc (\w+);", text))),
    )


def _blob(text: str, name: str) -> bytes:
    literal = re.search(rf'opts\.{name} = \(void \*\)"(.*?)";', text, re.DOTALL)
    size = re.search(rf"opts\.{name}_sz = (\d+);", text)
    if literal is None or size is None:
        raise ValueError(f"bpftool's header has no {name}")
    digits = literal[1].replace("\\\n", "")
    if not re.fullmatch(r"(\\x[0-9a-f]{2}|\\0)*", digits):
        raise ValueError(f"bpftool writes {name} in another way than this knows")
    data = bytes.fromhex(digits.replace("\\0", "00").replace("\\x", ""))
    if len(data) != int(size[1]):
        raise ValueError(f"{name} has {len(data)} bytes, and {size[1]} are announced")
    return data


def main() -> int:
    missing = missing_tools()
    if missing:
        print(f"make bpf needs Debian's {', '.join(missing)}", file=sys.stderr)
        return 1
    directory = Path(__file__).parents[1] / "mobility_agent" / "tracking" / "bpf"
    (directory / SKELETON_FILE).write_bytes(compile_skeleton(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
