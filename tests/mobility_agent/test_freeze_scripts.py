"""Scripts around freezes: in order, in time, only root's, and whoever heard of a freeze hears of its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mobility_agent.consistency.scripts import FreezeScripts
from mobility_agent.errors import ScriptFailed
from tests.deploy.needed_tools import not_here

Write = Callable[..., Path]
LONG_SECONDS = 60.0


@pytest.fixture
def write(tmp_path: Path) -> Write:
    if os.geteuid() != 0:
        not_here("scripts around freezes have to be root's")
    (tmp_path / "scripts.d").mkdir(mode=0o755)

    def write(name: str, body: str = "", *, mode: int = 0o755) -> Path:
        script = tmp_path / "scripts.d" / name
        script.write_text(f'#!/bin/sh\necho "{name} $1" >>{tmp_path}/ran\n{body}\n')
        script.chmod(mode)
        return script

    return write


@pytest.fixture
def scripts(tmp_path: Path) -> FreezeScripts:
    return FreezeScripts(tmp_path / "scripts.d", seconds_max=LONG_SECONDS)


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran").read_text().splitlines()


async def test_they_run_in_order_before_and_in_reverse_after(
    scripts: FreezeScripts, write: Write, tmp_path: Path
) -> None:
    for name in ("20-second", "10-first", "30-third"):
        write(name)
    write("readme.txt")
    write("not-executable", mode=0o644)
    found = scripts.found()
    await scripts.before_freeze(found, mount_points=["/a"])
    await scripts.after_thaw(found, mount_points=["/a"])
    assert ran(tmp_path) == [
        *("10-first freeze", "20-second freeze", "30-third freeze"),
        *("30-third thaw", "20-second thaw", "10-first thaw"),
    ]


async def test_they_are_told_what_is_frozen(scripts: FreezeScripts, write: Write, tmp_path: Path) -> None:
    write("one", f'printf %s "$FARPOINT_MOUNT_POINTS" >{tmp_path}/points')
    await scripts.before_freeze(scripts.found(), mount_points=["/", "/srv/a b"])
    assert (tmp_path / "points").read_text() == "/\n/srv/a b"


async def test_one_that_fails_ends_it_and_those_that_ran_hear_of_the_thaw(
    scripts: FreezeScripts, write: Write, tmp_path: Path
) -> None:
    write("1", "")
    write("2", 'test "$1" = thaw || { echo the database is away; exit 3; }')
    write("3", "")
    with pytest.raises(ScriptFailed, match="exit status 3: the database is away"):
        await scripts.before_freeze(scripts.found(), mount_points=[])
    assert ran(tmp_path) == ["1 freeze", "2 freeze", "2 thaw", "1 thaw"]


async def test_one_that_fails_after_the_thaw_keeps_none_from_hearing_of_it(
    scripts: FreezeScripts, write: Write, tmp_path: Path
) -> None:
    write("1", "")
    write("2", "exit 1")
    with pytest.raises(ScriptFailed, match="2: thaw: exit status 1"):
        await scripts.after_thaw(scripts.found(), mount_points=[])
    assert ran(tmp_path) == ["2 thaw", "1 thaw"]


async def test_one_that_takes_too_long_is_killed_with_all_that_it_started(write: Write, tmp_path: Path) -> None:
    write("slow", f'test "$1" = thaw && exit; sleep 3600 & echo $! >{tmp_path}/child; wait')
    hasty = FreezeScripts(tmp_path / "scripts.d", seconds_max=2.0)
    with pytest.raises(ScriptFailed, match="not done after 2 s"):
        await hasty.before_freeze(hasty.found(), mount_points=[])
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] in "ZX"


async def test_what_one_leaves_running_is_not_waited_for(scripts: FreezeScripts, write: Write, tmp_path: Path) -> None:
    """A session that holds a lock until the thaw."""
    write(
        "session",
        f'if test "$1" = freeze; then sleep 3600 & echo $! >{tmp_path}/child; else kill $(cat {tmp_path}/child); fi',
    )
    found = scripts.found()
    await scripts.before_freeze(found, mount_points=[])
    assert Path(f"/proc/{int((tmp_path / 'child').read_text())}").exists()
    await scripts.after_thaw(found, mount_points=[])


@pytest.mark.parametrize("mode", [0o775, 0o757])
async def test_what_others_may_write_is_not_run(
    scripts: FreezeScripts, write: Write, tmp_path: Path, mode: int
) -> None:
    write("open", mode=mode)
    with pytest.raises(ScriptFailed, match="others than root"):
        await scripts.before_freeze(scripts.found(), mount_points=[])
    assert not (tmp_path / "ran").exists()


async def test_what_lies_where_others_may_write_is_not_run(
    scripts: FreezeScripts, write: Write, tmp_path: Path
) -> None:
    write("one")
    (tmp_path / "scripts.d").chmod(0o777)
    with pytest.raises(ScriptFailed, match="others than root"):
        await scripts.before_freeze(scripts.found(), mount_points=[])


async def test_a_link_that_others_could_have_put_there_is_not_run(
    scripts: FreezeScripts, write: Write, tmp_path: Path
) -> None:
    """What it leads to is root's; where it lies is everybody's."""
    (tmp_path / "scripts.d" / "link").symlink_to("/bin/true")
    await scripts.before_freeze(scripts.found(), mount_points=[])
    (tmp_path / "scripts.d").chmod(0o777)
    with pytest.raises(ScriptFailed, match="others than root"):
        await scripts.before_freeze(scripts.found(), mount_points=[])


async def test_one_that_is_gone_when_its_turn_comes_counts_as_failed_and_the_others_hear_of_the_thaw(
    scripts: FreezeScripts, write: Write, tmp_path: Path
) -> None:
    write("1")
    gone = write("2")
    found = scripts.found()
    gone.unlink()
    with pytest.raises(ScriptFailed, match="No such file"):
        await scripts.before_freeze(found, mount_points=[])
    assert ran(tmp_path) == ["1 freeze", "1 thaw"]


async def test_what_another_owns_is_not_run(scripts: FreezeScripts, write: Write, tmp_path: Path) -> None:
    os.chown(write("his"), 65534, 65534)
    with pytest.raises(ScriptFailed, match="others than root"):
        await scripts.before_freeze(scripts.found(), mount_points=[])


async def test_one_that_cannot_be_run_says_why(scripts: FreezeScripts, write: Write, tmp_path: Path) -> None:
    write("broken").write_text("#!/no/such/interpreter\n")
    with pytest.raises(ScriptFailed, match="No such file"):
        await scripts.before_freeze(scripts.found(), mount_points=[])


def test_where_there_is_no_directory_there_are_none(tmp_path: Path) -> None:
    assert FreezeScripts(tmp_path / "missing", seconds_max=1.0).found() == []
