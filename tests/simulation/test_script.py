"""A script says all that goes wrong: the same script is the same run, and a failing one shrinks to a few decisions."""

import random

import pytest

from tests.simulation.campaigns import CORRECTED_CLOCK, CRASH_LOOP, draw_campaign
from tests.simulation.faults import AWAY, CAMPAIGN_KINDS, FAULTS, draw_script, is_known
from tests.simulation.script import Script
from tests.simulation.shrinking import invariants_of, shrink
from tests.simulation.tampering import TAMPERINGS
from tests.simulation.world import run_seed


def drawn(seed):
    return draw_script(seed, random.Random(f"{seed} faults"), horizon_seconds=30.0, is_flood=False)


def test_a_script_comes_back_from_json_as_it_was():
    for seed in range(20):
        script = drawn(seed)[1]
        assert Script.from_json(script.to_json(violates="1-acknowledged-survives")) == script
    assert Script.from_json(Script(seed=1, decisions=()).to_json()) == Script(seed=1, decisions=())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "seed": 1, "decisions": []}'])
def test_what_is_no_script_is_refused(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        Script.from_json(text)


def test_each_seed_knows_another_subset_of_faults_and_all_kinds_come_up():
    swarms = [drawn(seed) for seed in range(400)]
    breadths = {len(swarm.weights) for swarm, _ in swarms}
    assert min(breadths) == 1
    assert max(breadths) == len(FAULTS.keys() - CAMPAIGN_KINDS)
    kinds = {decision.kind for _, script in swarms for decision in script.decisions}
    assert kinds == {*FAULTS, *TAMPERINGS, AWAY} - CAMPAIGN_KINDS
    assert all(is_known(kind) for kind in kinds)
    for swarm, script in swarms:
        assert {one.kind for one in script.decisions if one.kind in FAULTS} <= set(swarm.weights)


@pytest.mark.parametrize("is_flood", [False, True])
def test_some_seeds_have_a_campaign_whose_faults_come_one_after_the_other(is_flood):
    campaigns = [
        draw_campaign(random.Random(f"{seed} campaign"), horizon_seconds=60.0, is_flood=is_flood) for seed in range(200)
    ]
    known = {kind for step in (CRASH_LOOP if is_flood else CORRECTED_CLOCK) for kind in step.kinds}
    assert {decision.kind for campaign in campaigns for decision in campaign} == known
    assert known <= FAULTS.keys()
    assert 0 < sum(map(bool, campaigns)) < len(campaigns)
    for campaign in campaigns:
        times = [decision.at_seconds for decision in campaign]
        assert times == sorted(times)
        assert all(0 <= at_seconds < 60.0 for at_seconds in times)


def test_a_campaign_has_the_run_to_itself_until_the_faults_end():
    campaign = next(
        found
        for seed in range(100)
        if (found := draw_campaign(random.Random(seed), horizon_seconds=30.0, is_flood=False))
    )
    swarm, script = draw_script(34, random.Random(34), horizon_seconds=30.0, is_flood=False, campaign=campaign)
    assert swarm.weights.keys() == {one.kind for one in campaign}
    assert script.decisions[: len(campaign)] == tuple(campaign)
    assert {one.kind for one in script.decisions[len(campaign) :]} <= {*TAMPERINGS, AWAY}


def test_a_run_with_its_own_script_is_the_same_run():
    result = run_seed(34)
    again = run_seed(34, Script.from_json(result.script.to_json()))
    assert again.trace == result.trace


def test_a_run_without_decisions_is_calm():
    result = run_seed(34, Script(seed=34, decisions=()))
    assert result.faults == {}
    assert result.violations == []
    assert result.points_recovered > 0


def test_a_script_that_breaks_nothing_does_not_shrink():
    with pytest.raises(ValueError, match="does not break"):
        shrink(Script(seed=34, decisions=()), "1-acknowledged-survives", on_progress=lambda attempts, left: None)
    assert invariants_of(run_seed(34, Script(seed=34, decisions=()))) == []
