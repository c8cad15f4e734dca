"""Whole runs: nothing is violated, one seed is one trace in every process, and every planted defect is found."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.planted import PLANTED_FAULTS
from tests.simulation.world import run_seed

SMOKE_SEEDS = range(1, 21)
PLANTED_SEEDS_MAX = 150


def run(*arguments, hash_seed="random"):
    """The command line, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=False,
        timeout=280,
    )


def simulate(*arguments, hash_seed="random"):
    """(exit status, the JSON of the last line, stderr)."""
    completed = run(*arguments, hash_seed=hash_seed)
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


@pytest.mark.parametrize(
    "fault", ["acknowledge-before-synchronize", "clear-before-acknowledge", "check-no-trailer", "keep-no-grants"]
)
def test_a_planted_defect_is_found_and_the_exit_status_says_so(fault):
    status, summary, progress = simulate("--seeds", str(PLANTED_SEEDS_MAX), "--fault", fault, "--stop-at-first")
    assert status == 1
    assert summary["violations"]
    assert f"--fault {fault} --trace" in progress


def test_every_planted_defect_still_has_its_seam():
    names = sorted(PLANTED_FAULTS)
    program = f"from tests.simulation.planted import plant\nfor name in {names}: plant(name)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_every_invariant_with_a_mechanism_has_three_planted_defects():
    counts = Counter(planted.invariant for planted in PLANTED_FAULTS.values())
    assert set(counts) == {1, 2, 3, 6, 7, 9, 10, 11, 13, 14, 15}
    assert min(counts.values()) >= 3


def test_a_planted_defect_shrinks_to_a_few_decisions_and_the_script_fails_again(tmp_path):
    fault = ("--fault", "check-no-trailer")
    _, summary, _ = simulate("--seeds", str(PLANTED_SEEDS_MAX), *fault, "--stop-at-first")
    seed = str(summary["violations"][0]["seed"])
    shrunk = run("--shrink", seed, *fault)
    script = json.loads(shrunk.stdout)
    assert script["violates"].startswith("9-")
    assert len(script["decisions"]) <= 2
    file = tmp_path / "script.json"
    file.write_text(shrunk.stdout)
    assert simulate("--script", str(file), *fault)[0] == 1
    assert simulate("--script", str(file))[0] == 0


def test_the_search_for_planted_defects_says_how_many_seeds_each_took():
    status, summary, _ = simulate("--planted", "--planted-name", "seal-nothing", "--seeds", "20")
    assert status == 0
    (found,) = summary["planted"]
    assert found["invariant"] == 15
    assert 1 <= found["seeds"] <= 20
    assert found["violation"].startswith("15-")
    assert summary["not_found"] == []


def test_the_last_line_counts_seeds_events_faults_and_recovered_points():
    status, summary, _ = simulate("--seeds", "3", "--processes", "2")
    assert status == 0
    assert summary["seeds"] == 3
    assert summary["events"] > 100
    assert summary["points_recovered"] > 0
    assert sum(summary["faults"].values()) > 0
    assert summary["violations"] == []
