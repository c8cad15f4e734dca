"""The settings: durations with units, within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from config_server.settings import ConfigServerSettings


def test_durations_take_their_units_and_stay_within_what_the_control_plane_carries(tmp_path: Path) -> None:
    settings = ConfigServerSettings.model_validate({"state_directory": tmp_path, "rpo_threshold_seconds": "15 min"})
    assert settings.rpo_threshold_seconds == 900.0
    for value in ("0", "32 d", "soon"):
        with pytest.raises(ValidationError):
            ConfigServerSettings.model_validate({"state_directory": tmp_path, "heartbeat_seconds": value})
