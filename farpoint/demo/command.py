"""`farpoint demo`: runs the demo in a directory of its own and says whether what was recovered is what was there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from farpoint.demo.demo import SIZE_BYTES_MIN, Demo
from farpoint.demo.errors import DirectoryNotEmpty
from farpoint.demo.places import Places
from farpoint.demo.report import DemoResult, print_table
from farpoint.demo.stores import AzuriteStore, DirectoryStore
from farpoint.progress import progress_view
from farpoint.running import run_interruptible
from runtime.exit_codes import ExitCode
from runtime.output import notice, print_json
from runtime.units import parse_bytes


@click.command("demo")
@click.option("--json", "as_json", is_flag=True, help="JSON lines; the last one is the result.")
@click.option("--keep", type=click.Path(path_type=Path), help="Leave images, store and keys in this new directory.")
@click.option("--azurite", "on_azurite", is_flag=True, help="Store in the Azure Blob emulator, not in a directory.")
@click.option("--size", default=f"{SIZE_BYTES_MIN >> 20} MiB", show_default=True, help="Of the source image.")
def demo_command(as_json: bool, keep: Path | None, on_azurite: bool, size: str) -> ExitCode:
    """Replicate a disk and recover it, everything real. Exit code 0 only if all is identical."""
    try:
        size_bytes = parse_bytes(size)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--size") from error
    if not 2**26 <= size_bytes <= 2**40 or size_bytes % 4096:
        raise click.BadParameter("must be 64 MiB to 1 TiB, in blocks of 4096 bytes", param_hint="--size")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise DirectoryNotEmpty(path=keep)

    async def work() -> ExitCode:
        root = Path(tempfile.mkdtemp(prefix="farpoint-demo-")) if keep is None else keep.absolute()
        places = Places(root=root)
        try:
            store = AzuriteStore(places) if on_azurite else DirectoryStore(places)
            with progress_view(json_lines=as_json) as view:
                result = await Demo(places, store, view, size_bytes=size_bytes).run()
            _print(result, as_json=as_json)
            if keep is not None and store.start_command is not None:
                notice(f"to recover from what is kept, start its store again: {store.start_command}")
        finally:
            _tidy(root, is_kept=keep is not None)
        return ExitCode.OK if result.is_identical else ExitCode.FAILURE

    return run_interruptible(work)


def _print(result: DemoResult, *, as_json: bool) -> None:
    if as_json:
        print_json(result.record(), indent=None)
    else:
        print_table(result)


def _tidy(root: Path, *, is_kept: bool) -> None:
    """What is kept: images, store, keys and logs; never the servers' own state."""
    shutil.rmtree(Places(root=root).state if is_kept else root, ignore_errors=True)
