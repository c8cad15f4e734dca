"""What the simulation once found, by what it was.

A script in scripts/ is what shrinking left of a failing run: it breaks nothing any more, and breaks its promise again
once its defect, where that can be planted, is there again. Of older finds only the seeds are left: schedules shift as
programs and faults change, so a seed may no longer lead to the place; it is still a run like any other.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from process_server.opening import DiskOpener
from tests.simulation.script import Script
from tests.simulation.world import run_seed

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.json"))


@pytest.mark.parametrize("file", SCRIPTS, ids=[file.stem for file in SCRIPTS])
def test_a_script_that_broke_a_promise_breaks_none(file):
    script = Script.from_json(file.read_text())
    result = run_seed(script.seed, script)
    assert result.violations == []
    assert result.points_recovered > 0


@pytest.mark.parametrize("file", SCRIPTS, ids=[file.stem for file in SCRIPTS])
def test_it_breaks_it_again_with_its_defect_planted(file):
    fields = json.loads(file.read_text())
    if fields["fault"] is None:
        pytest.skip("its defect has no seam")
    completed = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--script", str(file), "--fault", fields["fault"]],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert completed.returncode == 1, completed.stderr
    violations = json.loads(completed.stdout.splitlines()[-1])["violations"]
    assert fields["violates"] in {violation["invariant"] for violation in violations}


def test_an_epoch_that_is_left_before_it_is_stored_is_noticed_though_the_grants_lead_around_it(monkeypatch):
    async def leave_at_once(opener, history):
        return

    monkeypatch.setattr(DiskOpener, "_wait_until_committed", leave_at_once)
    file = next(file for file in SCRIPTS if file.stem == "an-epoch-that-grants-lead-around-is-stored-before-it-is-left")
    script = Script.from_json(file.read_text())
    assert {one.invariant for one in run_seed(script.seed, script).violations} == {"1-acknowledged-survives"}


@pytest.mark.parametrize("seed", [10])
def test_a_cache_file_that_is_being_begun_is_never_taken_for_unused(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [1, 3, 7, 8])
def test_ticks_go_on_beside_the_housekeeping_so_that_points_get_new_instants(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [2, 90, 113])
def test_a_frame_buffer_pair_that_somebody_waits_for_is_taken_by_nobody_else(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [13, 69])
def test_a_full_cache_that_is_killed_again_and_again_keeps_what_is_committed_and_empties(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [5019, 5033, 5122, 5317])
def test_what_a_killed_process_server_had_not_synchronized_is_made_durable_before_it_is_acknowledged(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [5691])
def test_a_process_server_with_a_full_cache_drains_and_stops(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [40066, 40069])
def test_a_killed_process_that_is_still_unwound_takes_nothing_from_its_successor(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [2])
def test_an_epoch_whose_cache_was_lost_is_left_even_if_the_first_attempt_to_leave_it_fails(seed):
    assert run_seed(seed).violations == []


@pytest.mark.parametrize("seed", [20957])
def test_a_few_errors_of_the_cache_disk_in_a_row_do_not_fill_the_cache(seed):
    assert run_seed(seed).violations == []
