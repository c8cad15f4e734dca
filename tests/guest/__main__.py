"""`make guest`: the mobility agent on a Debian with a real systemd, in QEMU without a hypervisor.

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
from pathlib import Path
from typing import Final

from protocol.errors import ReplicationError
from runtime.errors import StateLocked
from runtime.locks import exclusive_lock
from tests.guest.guest_image import CACHE, ROOT, GuestImage, GuestMissing, check_tools, guest_image
from tests.guest.qemu_guest import GuestFailed
from tests.guest.story import PACKAGE, Story

RUN: Final = CACHE / "run"
NAME_SPACES: Final = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def main() -> int:
    """Outside of the name spaces, or inside."""
    parser = argparse.ArgumentParser(prog="make guest", description=__doc__)
    parser.add_argument("--package", type=Path, help="the agent's .deb; the one in dist/ by default")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--image-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    package = arguments.package or next(iter(sorted((ROOT / "dist").glob(f"{PACKAGE}_*.deb"))), None)
    if package is None:
        print("make guest: there is no package of the agent in dist/; run `make dist`", file=sys.stderr)
        return 1
    if arguments.inside is not None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return play(GuestImage(directory=arguments.inside), package, image_seconds=arguments.image_seconds)
    try:
        check_tools()
        with exclusive_lock(CACHE / "lock"):
            return make_and_play(package)
    except (GuestMissing, StateLocked, subprocess.CalledProcessError) as error:
        print(f"make guest: {error}", file=sys.stderr)
        return 1


def make_and_play(package: Path) -> int:
    """The image, which needs the network; then the rest, in name spaces of its own."""
    started = time.monotonic()
    print("guest: image …", file=sys.stderr)
    image, was_made = guest_image()
    seconds = round(time.monotonic() - started, 1)
    print(f"guest: image: {seconds} s ({'made' if was_made else 'kept from before'})", file=sys.stderr)
    inside = ["--inside", image.directory, "--image-seconds", seconds, "--package", package.absolute()]
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


def play(image: GuestImage, package: Path, *, image_seconds: float) -> int:
    """The run; its verdict goes to stdout."""
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(mode=0o700)
    os.umask(0o077)
    started = time.monotonic()
    # why a copy: dist/ may be made anew meanwhile
    story = Story(image, Path(shutil.copy(package, RUN)), RUN)
    failure = ""
    try:
        asyncio.run(story.run())
    except (GuestFailed, ReplicationError, OSError) as error:
        failure = str(error)
        print(f"guest: {failure}\nguest: the console and all logs are in {RUN}", file=sys.stderr)
    verdict = {
        "identical": not failure and all(story.figures["points"].values()),
        "seconds": round(image_seconds + time.monotonic() - started, 1),
        "steps": {"image": image_seconds} | story.seconds,
        **story.figures,
        **({"failure": failure} if failure else {}),
    }
    if not failure:
        shutil.rmtree(RUN)
    print(json.dumps(verdict))
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
