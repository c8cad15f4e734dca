"""`farpoint recover`: one disk of one recovery point, from the store and a recovery key file alone."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import click

from farpoint.options import vault_options
from farpoint.progress import ProgressView, progress_view
from farpoint.running import run_interruptible
from farpoint.settings import FarpointSettings
from farpoint.vault_connection import vault_of
from recovery.core.instants import instant_text
from recovery.image_writer import ImageTarget, open_target
from recovery.opened_vault import OpenedVault
from recovery.rebuild import READS_AT_ONCE, RebuildProgress, RecoveryPlan, plan_recovery, rebuild_disk
from recovery.verification import image_digest
from runtime.command_line import output_option
from runtime.exit_codes import ExitCode
from runtime.output import Output, notice, print_json
from runtime.settings import Loaded


@click.command("recover")
@click.option("--disk", required=True, help="An identifier, a prefix of it, or machine-name:disk-name.")
@click.option("--point", default="latest", show_default=True, help="latest, an identifier, or an RFC 3339 instant.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="A file that does not exist, or a block device.")
@click.option("--overwrite-device", is_flag=True, help="Confirm that all on the block device is overwritten.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--no-digest", is_flag=True, help="Do not read the result again for its blake3 digest.")
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@output_option
@vault_options
def recover_command(
    loaded: Loaded[FarpointSettings],
    output: Output,
    disk: str,
    point: str,
    target: Path | None,
    overwrite_device: bool,
    dry_run: bool,
    no_digest: bool,
    as_json: bool,
) -> ExitCode:
    """Rebuild a disk. With JSON: progress lines, then one line with the result."""
    is_json = as_json or output.format == "json"
    if target is None and not dry_run:
        raise click.UsageError("--to must be given, or --dry-run")

    async def work() -> None:
        with ThreadPoolExecutor(max_workers=READS_AT_ONCE, thread_name_prefix="recover") as executor:
            async with vault_of(loaded.settings, executor=executor) as vault:
                plan = await plan_recovery(vault, await vault.find_disk(disk), point, executor=executor)
                _tell_newest(plan)
                record = plan_record(plan)
                if target is not None:
                    image = open_target(target, size_bytes=plan.disk_size_bytes, overwrite_device=overwrite_device)
                    if not dry_run:
                        with progress_view(json_lines=is_json) as view:
                            record |= await _recover(vault, plan, image, executor, view)
                            if not no_digest:
                                record["blake3"] = await _digest(target, plan.disk_size_bytes, executor, view)
                        record["to"] = str(target)
        _print(record, is_json=is_json)

    return run_interruptible(work)


async def _recover(
    vault: OpenedVault, plan: RecoveryPlan, image: ImageTarget, executor: Executor, view: ProgressView
) -> dict[str, object]:
    def show(progress: RebuildProgress) -> None:
        view.show("recover", progress.bytes_written, progress.bytes_to_write)

    started = time.monotonic()
    await rebuild_disk(vault, plan, image, executor=executor, on_progress=show)
    return {"seconds": round(time.monotonic() - started, 3)}


async def _digest(target: Path, size_bytes: int, executor: Executor, view: ProgressView) -> str:
    """Of what the target gives back when it is read, not of what was handed to it."""
    is_cancelled = threading.Event()

    def show(done_bytes: int) -> None:
        if is_cancelled.is_set():
            raise InterruptedError
        view.show("digest", done_bytes, size_bytes)

    reading = functools.partial(image_digest, target, size_bytes=size_bytes, on_bytes=show)
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, reading)
    finally:
        is_cancelled.set()


def plan_record(plan: RecoveryPlan) -> dict[str, object]:
    """What is going to happen, for the operator."""
    return {
        "disk": plan.disk.disk,
        "name": plan.disk.full_name,
        "point": plan.point.point,
        "instant": instant_text(plan.point.instant_ns),
        "consistency": plan.point.consistency,
        "position": str(plan.point.position),
        "is_newest_visible": plan.is_newest_visible,
        "size_bytes": plan.disk_size_bytes,
        "segments": len(plan.shares),
        "frames_to_read": len(plan.rebuild.frames),
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
    }


def _tell_newest(plan: RecoveryPlan) -> None:
    """No server confirms the head here: say what is known, and by whom."""
    attested = instant_text(plan.point.instant_ns)
    if plan.is_newest_visible:
        text = f"newest visible point {plan.point.point}, attested at {attested}"
        notice(f"{text}; no server was asked whether there are newer ones")
    else:
        newest = plan.catalogue.points[-1]
        notice(f"point {plan.point.point} of {attested}; the newest visible is {newest.point}")
    for fault in plan.catalogue.history.damage:
        notice(f"damage, not in the way of this point: {fault}")


def _print(record: dict[str, object], *, is_json: bool) -> None:
    if is_json:
        print_json(record, indent=None)
    else:
        Output(format="table").record(record)
