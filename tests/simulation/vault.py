"""The vault that all runs of a process share. Its keys come from the operating system and never enter a trace: only
lengths do."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.vocabulary import VaultId
from storage.keys import RecoveryKey, VaultDescription, create_vault
from storage.object_names import VaultName
from tests.simulation.clock import VIRTUAL_EPOCH_NS

VAULT: Final = VaultId("5eed" * 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedVault:
    """A vault, the key that grants, and one key that recovers."""

    vault: VaultId
    name: str
    vault_json: bytes
    description: VaultDescription
    authority: Ed25519PrivateKey
    recovery_key: RecoveryKey


@functools.cache
def make_vault() -> SimulatedVault:
    new = create_vault(vault=VAULT, created_ns=VIRTUAL_EPOCH_NS, recovery_labels=("one", "two"))
    return SimulatedVault(
        vault=VAULT,
        name=str(VaultName(vault=VAULT)),
        vault_json=new.vault_json,
        description=new.description,
        authority=new.authority.private_key,
        recovery_key=new.recovery_keys[0],
    )
