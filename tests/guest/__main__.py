"""`make guest`: the mobility agent on a Debian with a real systemd, in QEMU without a hypervisor.

Two stories, each on a guest of its own: the package, and a live machine with all its disks.

It runs in name spaces of its own: its ports are nobody else's, the guest reaches nothing but them, and nothing outlives
it. The last line of stdout is JSON; exit status 0 only if everything held. What a failed run leaves is in .guest/run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from protocol.errors import ReplicationError
from runtime.errors import StateLocked
from runtime.locks import exclusive_lock
from tests.guest.guest_image import CACHE, ROOT, GuestImage, GuestMissing, check_tools, guest_image
from tests.guest.live_machine import LiveMachine
from tests.guest.qemu_guest import GuestFailed
from tests.guest.stage import PACKAGE
from tests.guest.story import Story

RUN: Final = CACHE / "run"
STORIES: Final[dict[str, type[Story | LiveMachine]]] = {"package": Story, "live-machine": LiveMachine}
NAME_SPACES: Final = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def main() -> int:
    """Outside of the name spaces, or inside."""
    parser = argparse.ArgumentParser(prog="make guest", description=__doc__)
    parser.add_argument("--package", type=Path, help="the agent's .deb; the one in dist/ by default")
    parser.add_argument("--story", choices=STORIES, action="append", help="only this one; can be repeated")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--image-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    stories = arguments.story or list(STORIES)
    package = arguments.package or next(iter(sorted((ROOT / "dist").glob(f"{PACKAGE}_*.deb"))), None)
    if package is None:
        print("make guest: there is no package of the agent in dist/; run `make dist`", file=sys.stderr)
        return 1
    if arguments.inside is not None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        image = GuestImage(directory=arguments.inside)
        return play(image, package, stories, image_seconds=arguments.image_seconds)
    try:
        check_tools()
        with exclusive_lock(CACHE / "lock"):
            return make_and_play(package, stories)
    except (GuestMissing, StateLocked, subprocess.CalledProcessError) as error:
        print(f"make guest: {error}", file=sys.stderr)
        return 1


def make_and_play(package: Path, stories: Sequence[str]) -> int:
    """The image, which needs the network; then the stories, in name spaces of their own."""
    started = time.monotonic()
    print("guest: image …", file=sys.stderr)
    image, was_made = guest_image()
    seconds = round(time.monotonic() - started, 1)
    print(f"guest: image: {seconds} s ({'made' if was_made else 'kept from before'})", file=sys.stderr)
    inside = ["--inside", image.directory, "--image-seconds", seconds, "--package", package.absolute()]
    inside += [word for name in stories for word in ("--story", name)]
    # why setpriv: nothing outlives a run that is killed
    words = [
        "setpriv",
        "--pdeathsig=KILL",
        "unshare",
        *NAME_SPACES,
        sys.executable,
        "-m",
        "tests.guest",
        *(str(word) for word in inside),
    ]
    return subprocess.run(words, cwd=ROOT, check=False).returncode


def play(image: GuestImage, package: Path, stories: Sequence[str], *, image_seconds: float) -> int:
    """The stories in turn, until one fails; the verdict goes to stdout."""
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(mode=0o700)
    os.umask(0o077)
    started = time.monotonic()
    # why a copy: dist/ may be made anew meanwhile
    package = Path(shutil.copy(package, RUN))
    told: dict[str, dict[str, Any]] = {}
    failure = ""
    for name in stories:
        print(f"guest: the story of the {name}", file=sys.stderr)
        directory = RUN / name
        directory.mkdir()
        told[name.replace("-", "_")], failure = play_one(STORIES[name](image, package, directory))
        if failure:
            print(f"guest: {failure}\nguest: the console and all logs are in {directory}", file=sys.stderr)
            break
        shutil.rmtree(directory)
    points = [is_identical for story in told.values() for is_identical in story.get("points", {}).values()]
    verdict = {
        "identical": not failure and all(points),
        "seconds": round(image_seconds + time.monotonic() - started, 1),
        "image_seconds": image_seconds,
        **told,
        **({"failure": failure} if failure else {}),
    }
    if not failure:
        shutil.rmtree(RUN)
    print(json.dumps(verdict))
    return 1 if failure else 0


def play_one(story: Story | LiveMachine) -> tuple[dict[str, Any], str]:
    """What it says, and why it failed."""
    failure = ""
    try:
        asyncio.run(story.run())
    except (GuestFailed, ReplicationError, OSError) as error:
        failure = str(error)
    return {"steps": story.stage.seconds, **story.stage.figures}, failure


if __name__ == "__main__":
    sys.exit(main())
