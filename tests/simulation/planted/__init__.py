"""Defects that the simulation must find, each beside the invariant (DESIGN §11) that it breaks.

Each is planted at a named seam of the product (seams.py), in this process only. The invariants that are not here have
no mechanism yet: 4 and 5 need frozen machines and groups, 8 a fold that deletes, 12 failback.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.simulation.planted import agent, process_server, vault


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedFault:
    """A defect. invariant: the number in DESIGN §11 that it breaks; a violation that names it counts as finding it."""

    invariant: int
    plant: Callable[[], None]

    def is_named_by(self, violated: str) -> bool:
        return violated.split("-", 1)[0] == str(self.invariant)


def _breaks(invariant: int, *defects: Callable[[], None]) -> dict[str, PlantedFault]:
    return {defect.__name__.replace("_", "-"): PlantedFault(invariant=invariant, plant=defect) for defect in defects}


PLANTED_FAULTS: Final[dict[str, PlantedFault]] = {
    **_breaks(
        1,
        process_server.acknowledge_before_synchronize,
        process_server.ignore_failed_synchronize,
        process_server.trust_what_a_kill_left,
        process_server.remove_files_in_use,
    ),
    **_breaks(
        2,
        agent.clear_before_acknowledge,
        agent.forget_at_durable,
        agent.forget_what_was_interrupted,
        agent.keep_digests_of_the_lost,
    ),
    **_breaks(3, agent.settle_without_stillness, agent.overlook_a_broken_proof, agent.prove_stillness_too_late),
    **_breaks(6, process_server.commit_out_of_order, vault.take_no_answer_for_success, vault.apply_the_oldest_last),
    **_breaks(7, vault.close_no_epoch, vault.take_a_taken_name_for_ours, vault.check_no_grant),
    **_breaks(9, vault.check_no_trailer, vault.check_no_place, vault.skip_damaged_frames, vault.check_no_seal),
    **_breaks(
        10,
        vault.look_at_no_records,
        vault.pass_over_the_damaged,
        vault.keep_quiet_about_damage,
        vault.choose_by_instant,
    ),
    **_breaks(
        11,
        process_server.state_points_at_durable,
        process_server.believe_what_the_disk_says,
        vault.believe_the_list,
        agent.date_by_the_own_clock,
        process_server.tell_the_own_clock,
        process_server.compare_instants_of_different_clocks,
        process_server.date_no_further_than_the_last_tick,
    ),
    **_breaks(
        13,
        process_server.give_the_cache_no_limit,
        process_server.remove_no_files,
        process_server.try_uploads_once,
        process_server.give_away_the_kept_room,
        process_server.never_follow_a_clock_back,
    ),
    **_breaks(
        14,
        process_server.keep_no_grants,
        process_server.keep_no_clock,
        process_server.grant_no_spare,
        agent.forget_orders,
    ),
    **_breaks(15, vault.seal_nothing, process_server.keep_data_keys, process_server.use_one_data_key),
}
"""By the name for FAULT=, which says what is wrong."""

EARLIER_NAMES: Final = {
    "acknowledge-before-sync": "acknowledge-before-synchronize",
    "no-trailer-check": "check-no-trailer",
}
"""What scripts and notes of others still call them."""


def plant(name: str) -> None:
    """For the rest of this process. Raises SeamMoved."""
    PLANTED_FAULTS[name].plant()
