"""Connections that are cut at any byte, trickle, stand open with nobody behind, or accept and say nothing."""

from __future__ import annotations

import time
from typing import Final

from tests.torture.tcp_proxy import Behaviour, Treatment
from tests.torture.torment import Torment

SECONDS_MIN: Final = 0.5
SECONDS_MAX: Final = 3.0
CUT_BYTES_MAX: Final = 2**20
PIECE_BYTES_MAX: Final = 2000
BEHAVIOURS_MAX: Final = 3


class BadConnections(Torment):
    """Between the agent and the process server, or between either and the configuration server."""

    kind = "bad connections"

    def arrange(self) -> str:
        self._behaviours = []
        for _ in range(self.draw.randint(1, BEHAVIOURS_MAX)):
            treatments = [treatment for treatment in Treatment if treatment is not Treatment.PASS]
            behaviour = Behaviour(
                treatment=self.draw.choice([*treatments, Treatment.CUT]),
                upward=self.draw.random() < 0.6,
                # why: greetings are hundreds of bytes, frames a megabyte
                after_bytes=int(CUT_BYTES_MAX ** self.draw.random()),
                piece_bytes=int(PIECE_BYTES_MAX ** self.draw.random()),
            )
            proxy = self.draw.choice(("process-server", "process-server", "config-server"))
            self._behaviours.append((proxy, behaviour, self.draw.uniform(SECONDS_MIN, SECONDS_MAX)))
        return ", then ".join(f"{proxy}: {one} for {seconds:.1f} s" for proxy, one, seconds in self._behaviours)

    def run(self) -> None:
        with self.site.busy(self.draw):
            for name, behaviour, seconds in self._behaviours:
                proxy = self.site.proxies[name]
                cuts = proxy.cut_count
                proxy.behave(behaviour)
                try:
                    time.sleep(seconds)
                finally:
                    proxy.behave(Behaviour())
                if behaviour.treatment is Treatment.CUT:
                    self.counts["connection cut at a byte"] += proxy.cut_count - cuts
                else:
                    self.counts[f"connections: {behaviour.treatment.value}"] += 1
