import math
from types import SimpleNamespace

import pytest

from agents.baselines import (
    FAMILIES,
    LEVELS,
    BackOff,
    Cosine,
    KnownScale,
    ReduceOnPlateau,
    Static,
    frozen_backbone,
    layer_decay,
    small_backbone,
    uniform,
)
from agents.rollout import run_controller
from asg_env.core.telemetry import Telemetry
from asg_env.instances import Instance

INSTANCE = Instance("ASG/Digits-v0", 0, 0)


def trainer(groups):
    """Stands in for a trainer: a hand-made controller reads no more than its layer groups."""
    return SimpleNamespace(layer_groups=tuple(f"group-{g}" for g in range(groups)))


def report(objective: float) -> Telemetry:
    zeros = (0.0,) * 3
    return Telemetry(
        ce=objective,
        kl=0.0,
        objective=objective,
        head_mean=0.0,
        head_std=0.0,
        grad_norms=zeros,
        drifts=zeros,
        update_ratios=zeros,
        weight_norms=zeros,
        alignments=zeros,
        diverged=False,
        cause="",
    )


def multipliers_under(controller, objectives, groups=3):
    """The first group's multiplier before the first window and after each objective."""
    controller.begin(INSTANCE, trainer(groups))
    rows = [controller.multipliers(0.0, None)]
    rows += [controller.multipliers(0.5, report(objective)) for objective in objectives]
    assert all(len(row) == groups and len(set(row)) == 1 for row in rows)
    return [row[0] for row in rows]


def test_uniform_is_one_rate_for_all():
    assert uniform(0.3, 4).vector == (0.3,) * 4


def test_small_backbone_trains_the_head_ten_times_faster():
    assert small_backbone(0.3, 4).vector == pytest.approx((0.03, 0.03, 0.03, 0.3))


def test_frozen_backbone_trains_the_head_alone():
    assert frozen_backbone(0.3, 4).vector == (0.0, 0.0, 0.0, 0.3)


def test_layer_decay_shrinks_towards_the_input():
    assert layer_decay(0.8, 0.5, 4).vector == pytest.approx((0.1, 0.2, 0.4, 0.8))


def test_static_refuses_another_number_of_groups():
    with pytest.raises(ValueError, match="a static vector needs 5 multipliers"):
        Static((0.1, 0.2)).begin(INSTANCE, trainer(5))


def test_known_scale_divides_by_the_hidden_scale_and_clips():
    fast = Instance("ASG/Digits-v0", 0, 0, base_lr_scale=4.0)
    slow = Instance("ASG/Digits-v0", 0, 0, base_lr_scale=0.25)
    vector = (0.1, 0.5, 0.0)
    for clip, instance, expected in (
        (True, fast, (0.025, 0.125, 0.0)),
        (True, slow, (0.4, 1.0, 0.0)),
        (False, slow, (0.4, 2.0, 0.0)),
    ):
        controller = KnownScale(vector, clip)
        controller.begin(instance, trainer(3))
        assert tuple(controller.multipliers(0.5, None)) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_cosine_falls_from_its_top_to_zero(progress, share):
    controller = Cosine(0.3)
    controller.begin(INSTANCE, trainer(2))
    assert controller.multipliers(progress, None) == pytest.approx([0.3 * share] * 2, abs=1e-12)


def test_cosine_at_a_third_is_three_quarters():
    controller = Cosine(1.0)
    controller.begin(INSTANCE, trainer(1))
    assert controller.multipliers(1 / 3, None) == pytest.approx([0.75])


def test_reduce_on_plateau_waits_then_divides_by_three():
    # Falls, then two windows without a fall of 1 %: the first is waited for, the second counts.
    values = multipliers_under(ReduceOnPlateau(0.9), [2.0, 1.0, 0.995, 1.0, 0.99, 0.98, 0.5])
    assert values == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.3, 0.3, 0.3, 0.3])


def test_reduce_on_plateau_divides_again_after_two_more_windows():
    values = multipliers_under(ReduceOnPlateau(0.9), [1.0] * 6)
    assert values == pytest.approx([0.9, 0.9, 0.9, 0.3, 0.3, 0.1, 0.1])


def test_reduce_on_plateau_counts_a_fall_of_more_than_the_threshold():
    falling = [0.98**k for k in range(8)]
    assert multipliers_under(ReduceOnPlateau(0.9), falling) == [0.9] * 9


def test_back_off_raises_until_the_loss_rises_then_steps_back_and_holds():
    values = multipliers_under(BackOff(0.01, back=10.0), [2.0, 1.8, 1.9, 5.0, 0.1])
    assert values == pytest.approx([0.01, 0.03, 0.09, 0.009, 0.009, 0.009])


def test_back_off_stops_at_one():
    values = multipliers_under(BackOff(0.2), [2.0, 1.9, 1.8, 1.7])
    assert values == pytest.approx([0.2, 0.6, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("controller", [ReduceOnPlateau(0.9), BackOff(0.01), Cosine(0.9)])
def test_controllers_start_every_episode_afresh(controller):
    objectives = [1.0, 2.0, 3.0, 4.0]
    assert multipliers_under(controller, objectives) == multipliers_under(controller, objectives)


@pytest.mark.parametrize("groups", [1, 5, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_valid_candidates_for_any_number_of_groups(family, groups):
    candidates = FAMILIES[family](groups)
    assert len(candidates) >= 6
    for name, controller in candidates.items():
        controller.begin(INSTANCE, trainer(groups))
        telemetry = None
        for progress, objective in ((0.0, 2.0), (0.5, 3.0), (0.9, math.nan)):
            values = list(controller.multipliers(progress, telemetry))
            telemetry = report(objective)
            assert len(values) == groups, name
            assert all(math.isfinite(m) and 0 <= m <= 1 for m in values), (name, values)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_name_each_candidate_once_and_make_it_anew(family):
    first, second = FAMILIES[family](5), FAMILIES[family](5)
    assert first.keys() == second.keys()
    assert all(first[name] is not second[name] for name in first)
    assert first == second


def test_families_try_every_level_as_a_top():
    assert set(FAMILIES["uniform"](2)) == {f"{m:g}" for m in LEVELS}
    assert {c.vector for c in FAMILIES["uniform"](2).values()} == {(m, m) for m in LEVELS}


def test_families_cover_the_usual_ways_to_set_rates():
    assert set(FAMILIES) == {
        "uniform",
        "small-backbone",
        "frozen-backbone",
        "layer-decay",
        "cosine",
        "plateau",
        "back-off",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_families_run_on_the_environment(family, env, instance):
    controller = next(iter(FAMILIES[family](5).values()))
    episode = run_controller(env, controller, instance)
    assert episode.multipliers.shape == (3, 5)
