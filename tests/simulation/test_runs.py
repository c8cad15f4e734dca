"""Whole runs: nothing is violated, one seed is one trace in every process, and every planted defect is found."""

import json
import os
import subprocess
import sys

import pytest

from tests.simulation.planted_faults import PLANTED_FAULTS
from tests.simulation.world import run_seed

SMOKE_SEEDS = range(1, 21)
PLANTED_SEEDS_MAX = 150


def simulate(*arguments, hash_seed="random"):
    """The command line, in a process of its own: (exit status, the JSON of the last line, stderr)."""
    completed = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=False,
        timeout=280,
    )
    return completed.returncode, json.loads(completed.stdout.splitlines()[-1]), completed.stderr


@pytest.mark.parametrize("seed", SMOKE_SEEDS)
def test_a_run_under_faults_keeps_every_promise_and_recovers_every_point(seed):
    result = run_seed(seed)
    assert result.violations == []
    assert result.points_recovered > 0


def test_one_seed_gives_one_trace_under_every_hash_seed_and_again_in_the_same_process():
    hashes = {}
    for hash_seed in ("0", "1", "4242"):
        _, summary, progress = simulate(
            "--seeds", "4", "--first-seed", "30", "--processes", "1", "--hashes", hash_seed=hash_seed
        )
        assert summary["violations"] == []
        hashes[hash_seed] = [line for line in progress.splitlines() if line.startswith("3")][:4]
    assert hashes["0"] == hashes["1"] == hashes["4242"]
    assert hashes["0"] == [f"{seed} {run_seed(seed).trace}" for seed in range(30, 34)]
    assert len(set(hashes["0"])) == 4


@pytest.mark.parametrize("fault", sorted(PLANTED_FAULTS))
def test_a_planted_defect_is_found_and_the_exit_status_says_so(fault):
    status, summary, progress = simulate("--seeds", str(PLANTED_SEEDS_MAX), "--fault", fault, "--stop-at-first")
    assert status == 1
    assert summary["violations"]
    assert f"--fault {fault} --trace" in progress


def test_the_last_line_counts_seeds_events_faults_and_recovered_points():
    status, summary, _ = simulate("--seeds", "3", "--processes", "2")
    assert status == 0
    assert summary["seeds"] == 3
    assert summary["events"] > 100
    assert summary["points_recovered"] > 0
    assert sum(summary["faults"].values()) > 0
    assert summary["violations"] == []
