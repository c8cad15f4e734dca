"""All fuzz targets by name: the one list that the suite and `make fuzz` share."""

from __future__ import annotations

from typing import Final

from tests.fuzz.agent_targets import AGENT_TARGETS
from tests.fuzz.process_server_targets import PROCESS_SERVER_TARGETS
from tests.fuzz.target import Target
from tests.fuzz.text_targets import TEXT_TARGETS
from tests.fuzz.vault_targets import VAULT_TARGETS
from tests.fuzz.wire_targets import WIRE_TARGETS

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (*WIRE_TARGETS, *VAULT_TARGETS, *PROCESS_SERVER_TARGETS, *AGENT_TARGETS, *TEXT_TARGETS)
}
