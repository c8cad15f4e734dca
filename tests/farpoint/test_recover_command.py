"""`farpoint recover | points | disks` against storage alone: data on stdout, the rest on stderr, known exit codes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from blake3 import blake3
from click.testing import CliRunner, Result

from farpoint.__main__ import main
from recovery.core.instants import instant_text
from runtime.exit_codes import ExitCode
from tests.recovery.made_vault import DISK, MadeVault, make_filled_vault, make_vault, noise, write


@pytest.fixture
def made(tmp_path: Path) -> MadeVault:
    return asyncio.run(make_filled_vault(tmp_path))


def run(made: MadeVault, command: str, *arguments: object) -> Result:
    vault = ("--store", made.url, "--recovery-key", made.key_path)
    return CliRunner().invoke(main, [str(argument) for argument in (command, *vault, *arguments)])


def test_latest_is_recovered_with_its_digest(made: MadeVault, tmp_path: Path) -> None:
    target = tmp_path / "image"
    done = run(made, "recover", "--disk", DISK, "--to", target, "-o", "json")
    assert done.exit_code == ExitCode.OK, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert target.read_bytes() == made.points[-1].image
    assert result["blake3"] == blake3(made.points[-1].image).hexdigest()
    assert result["point"] == made.points[-1].point
    assert all(json.loads(line) for line in done.stdout.splitlines())
    assert "newest visible point" in done.stderr


@pytest.mark.parametrize("selector", ["c3c3c3c3", "web-1:data"])
def test_a_disk_is_found_by_prefix_and_by_name(made: MadeVault, tmp_path: Path, selector: str) -> None:
    done = run(made, "recover", "--disk", selector, "--point", made.points[0].point[:8], "--to", tmp_path / "image")
    assert done.exit_code == ExitCode.OK, done.output
    assert (tmp_path / "image").read_bytes() == made.points[0].image


def test_a_dry_run_shows_the_plan_and_writes_nothing(made: MadeVault, tmp_path: Path) -> None:
    instant = instant_text(made.points[1].instant_ns)
    shown = run(made, "recover", "--disk", DISK, "--point", instant, "--to", tmp_path / "image", "--dry-run", "--json")
    assert shown.exit_code == ExitCode.OK
    plan = json.loads(shown.stdout)
    assert plan["point"] == made.points[1].point
    assert plan["instant"] == instant
    assert plan["consistency"] == "crash"
    assert plan["segments"] == 4
    assert plan["bytes_to_read"] > 0
    assert 0 < plan["bytes_to_write"] < len(made.image)
    assert not list(tmp_path.glob("image*"))


def test_what_is_not_there_ends_with_not_found(made: MadeVault, tmp_path: Path) -> None:
    target = ("--to", tmp_path / "image")
    unknown = run(made, "recover", "--disk", "f" * 32, *target)
    assert unknown.exit_code == ExitCode.NOT_FOUND
    assert DISK in unknown.stderr
    assert run(made, "recover", "--disk", DISK, "--point", "f" * 32, *target).exit_code == ExitCode.NOT_FOUND
    early = run(made, "recover", "--disk", DISK, "--point", "2001-01-01T00:00:00Z", *target)
    assert early.exit_code == ExitCode.NOT_FOUND
    assert made.points[0].point in early.stderr
    assert run(made, "recover", "--disk", DISK, "--point", "yesterday", *target).exit_code == ExitCode.USAGE
    assert run(made, "recover", "--disk", DISK).exit_code == ExitCode.USAGE


def test_an_existing_target_is_kept(made: MadeVault, tmp_path: Path) -> None:
    (tmp_path / "image").write_text("mine")
    refused = run(made, "recover", "--disk", DISK, "--to", tmp_path / "image")
    assert refused.exit_code == ExitCode.FAILURE
    assert (tmp_path / "image").read_text() == "mine"


def test_a_flipped_byte_fails_naming_the_segment(made: MadeVault, tmp_path: Path) -> None:
    path = made.segment_path(made.points[1].segment)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)
    failed = run(made, "recover", "--disk", DISK, "--to", tmp_path / "image")
    assert failed.exit_code == ExitCode.FAILURE
    assert str(made.points[1].segment) in failed.stderr
    assert made.points[0].point in failed.stderr
    assert not list(tmp_path.glob("image*"))


def test_points_and_disks_are_listed_from_storage_alone(made: MadeVault) -> None:
    points = json.loads(run(made, "points", "-o", "json").stdout)
    assert [point["point"] for point in points] == [point.point for point in made.points]
    assert all(point["recoverable"] for point in points)
    disks = json.loads(run(made, "disks", "-o", "json").stdout)
    assert disks[0]["disk"] == DISK
    assert disks[0]["newest_point"] == made.points[-1].point
    table = run(made, "points").stdout
    assert all(point.point in table for point in made.points)


def test_a_listing_of_a_damaged_vault_is_partial(made: MadeVault) -> None:
    made.segment_path(made.points[1].segment).unlink()
    listed = run(made, "points", "-o", "json")
    assert listed.exit_code == ExitCode.PARTIAL
    recoverable = {point["point"]: point["recoverable"] for point in json.loads(listed.stdout)}
    assert [recoverable[point.point] for point in made.points] == [True, False, False]
    assert str(made.points[1].segment) in listed.stderr


def test_an_interrupt_leaves_no_half_named_target(tmp_path: Path) -> None:
    async def make() -> MadeVault:
        made = await make_vault(tmp_path, disk_size_bytes=256 * 2**20)
        data = noise(1, 2**20)
        for number in range(256):
            await made.change(write(number * 2**20, data), point=number == 255)
        return made

    made = asyncio.run(make())
    target = tmp_path / "image"
    command = [sys.executable, "-m", "farpoint", "recover", "--store", made.url, "--recovery-key", made.key_path]
    with subprocess.Popen([*command, "--disk", DISK, "--to", target], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("image*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED, errors.decode()
    assert not list(tmp_path.glob("image*"))
