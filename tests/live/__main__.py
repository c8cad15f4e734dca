"""`make live ROUNDS=N`: hunts for lost updates on live disks; the last line of output is one JSON object.

Exit code 1 if anything was lost, a planted fault was not caught, a whole turn of all kinds settled nothing, or a freeze
point was not what it said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from typing import Final

from tests.live.freezes import hunt_points
from tests.live.hunt import FAULTS, KINDS, Found, hunt_once, rounds_until_caught
from tests.live.restarted import resync_after_an_unclean_stop
from tests.live.whole_hunt import hunt_whole_line_once

TOOLS: Final = ("fio", "mkfs.btrfs", "mkfs.ext4", "mkfs.xfs", "partx")
WHOLE_LINE: Final = "whole-line"
"""Through agent, process server and store; the other hunts are on the agent's part alone."""
TURN: Final = (WHOLE_LINE, *KINDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--kind", choices=TURN)
    parser.add_argument("--fault", nargs="*", choices=list(FAULTS), default=list(FAULTS), help="only these")
    arguments = parser.parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"make live needs {', '.join(missing)}", file=sys.stderr)
        return 2
    found = Found()
    for number in range(arguments.rounds):
        kind, seed = arguments.kind or TURN[number % len(TURN)], arguments.first_seed + number
        if kind == WHOLE_LINE:
            hunt_whole_line_once(seed // len(TURN) if arguments.kind is None else seed, found)
        else:
            hunt_once(kind, seed, found)
        print(f"round {number + 1} {kind}: {dataclasses.asdict(found)}", file=sys.stderr)
    caught = {}
    for name in arguments.fault:
        caught[name] = rounds_until_caught(name, arguments.first_seed)
        print(f"fault {name}: caught in round {caught[name]}", file=sys.stderr)
    points, are_points_well = hunt_points(arguments.rounds)
    unclean_stop = resync_after_an_unclean_stop()
    print(
        json.dumps(
            dataclasses.asdict(found) | {"faults_caught_in_round": caught, "unclean_stop_bytes": unclean_stop} | points
        )
    )
    has_settled_nothing = not found.still and arguments.rounds >= len(TURN)
    is_lost = found.lost or found.points_damaged or not all(caught.values()) or has_settled_nothing
    return int(bool(is_lost or not are_points_well))


if __name__ == "__main__":
    sys.exit(main())
