"""The main job with everything real, smaller: three processes, two points, recovered from store and key file alone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from farpoint.__main__ import main
from recovery.verification import images_are_identical
from runtime.exit_codes import ExitCode
from tests.azurite.server import require_azurite

SIZE = "64 MiB"


def demo(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "farpoint", "demo", "--json", "--size", SIZE, *(str(value) for value in arguments)]


def test_the_demo_recovers_both_points_and_keeps_what_it_says(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    finished = subprocess.run(demo("--keep", kept), capture_output=True, text=True, check=False, timeout=200)
    assert finished.returncode == ExitCode.OK, finished.stderr
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    result = lines[-1]
    assert result["identical"] is True
    assert len(lines) > 1
    assert len(set(result["points"])) == 2
    assert sorted(path.name for path in kept.iterdir()) == [
        *("keys", "logs", "recovered-1.img", "recovered-2.img", "source-1.img", "source-2.img", "store")
    ]
    for number in (1, 2):
        assert images_are_identical(kept / f"source-{number}.img", kept / f"recovered-{number}.img")
    assert not images_are_identical(kept / "source-1.img", kept / "source-2.img")
    initial, delta = result["phases"]["initial_replication"], result["phases"]["delta_replication"]
    assert initial["bytes_stored"] < initial["bytes_sent"] < result["size_bytes"]
    assert 0 < delta["bytes_sent"] < initial["bytes_sent"]
    _assert_every_segment_is_guarded(kept, result)


def _assert_every_segment_is_guarded(kept: Path, result: dict[str, object]) -> None:
    """One flipped byte in any segment fails the recovery, naming it, or changes nothing of what is recovered."""
    options = ["--store", str(result["store"]), "--recovery-key", str(result["recovery_key"])]
    named = 0
    segments = sorted((kept / "store").rglob("*.seg"))
    for segment in segments:
        sound = segment.read_bytes()
        damaged = bytearray(sound)
        damaged[len(sound) // 3] ^= 4
        segment.write_bytes(damaged)
        target = kept / "from-damaged.img"
        command = ["recover", *options, "--disk", str(result["disk"]), "--to", str(target), "--no-digest"]
        recovered = CliRunner().invoke(main, command)
        if recovered.exit_code == ExitCode.OK:
            assert images_are_identical(target, kept / "source-2.img")
            target.unlink()
        else:
            assert str(segment.relative_to(kept / "store")) in recovered.stderr
            assert not list(kept.glob("from-damaged*"))
            named += 1
        segment.write_bytes(sound)
    assert named >= len(segments) // 2


def test_the_demo_on_azurite_recovers_both_points_and_says_how_to_read_its_store_again(tmp_path: Path) -> None:
    require_azurite()
    kept = tmp_path / "kept"
    finished = subprocess.run(
        demo("--azurite", "--keep", kept), capture_output=True, text=True, check=False, timeout=250
    )
    assert finished.returncode == ExitCode.OK, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["identical"] is True
    assert len(set(result["points"])) == 2
    assert result["store"].startswith("azure://")
    assert not _processes_naming(tmp_path)
    assert not list(kept.rglob("*.seg")), "the copy shall lie in Azurite and nowhere else"
    assert result["store_start_command"] in finished.stderr
    vault_options = [
        *("--store", result["store"], "--store-credentials-file", result["store_credentials_file"]),
        *("--recovery-key", result["recovery_key"]),
    ]
    with subprocess.Popen(shlex.split(result["store_start_command"]), stdout=subprocess.PIPE, text=True) as azurite:
        try:
            assert azurite.stdout is not None
            assert any("successfully listens" in line for line in azurite.stdout)
            target = tmp_path / "again.img"
            again = CliRunner().invoke(main, ["recover", *vault_options, "--disk", result["disk"], "--to", str(target)])
            assert again.exit_code == ExitCode.OK, again.stderr
        finally:
            azurite.kill()
    assert images_are_identical(target, kept / "source-2.img")
    away = CliRunner().invoke(main, ["points", *vault_options])
    assert away.exit_code == ExitCode.FAILURE
    assert "Connect call failed" in away.stderr


def test_the_demo_says_how_azurite_is_installed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farpoint.demo.azurite._PROGRAM", tmp_path / "missing")
    refused = CliRunner().invoke(main, ["demo", "--azurite", "--keep", str(tmp_path / "kept")])
    assert refused.exit_code == ExitCode.FAILURE
    assert "Azurite, the Azure Blob emulator, is not here" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_the_demo_keeps_out_of_a_directory_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    refused = CliRunner().invoke(main, ["demo", "--keep", str(tmp_path)])
    assert refused.exit_code == ExitCode.FAILURE
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("options", "programs"), [((), 3), (("--azurite",), 4)], ids=["directory", "azurite"])
def test_an_interrupted_demo_leaves_no_process_and_no_directory(
    tmp_path: Path, options: tuple[str, ...], programs: int
) -> None:
    if options:
        require_azurite()
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        demo(*options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + 100
        while len(_processes_naming(tmp_path)) < programs:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, told
    assert not _processes_naming(tmp_path)
    assert not list(tmp_path.iterdir())


def _processes_naming(directory: Path) -> list[Path]:
    """The processes that have the directory in their command lines."""
    return [process for process in Path("/proc").glob("[0-9]*") if _names(process, directory)]


def _names(process: Path, directory: Path) -> bool:
    """Whether a process has the directory in its command line."""
    try:
        return str(directory).encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
