"""Where the demo's things lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """store, keys, logs and the images are what `--keep` keeps."""

    root: Path

    @property
    def disk_image(self) -> Path:
        return self.state / "disk.img"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def recovery_key(self) -> Path:
        return self.keys / "recovery-1.key"

    def source(self, number: int) -> Path:
        return self.root / f"source-{number}.img"

    def recovered(self, number: int) -> Path:
        return self.root / f"recovered-{number}.img"

    def make(self) -> None:
        for path in (self.state, self.logs, self.keys):
            path.mkdir(mode=0o700, parents=True)
