import math
from types import SimpleNamespace

import pytest
import torch

from agents.baselines import FAMILIES, LEVELS, Static
from agents.fit import fit
from agents.rules import (
    LARS,
    RULE_FAMILIES,
    RULES,
    AutoRGN,
    EarlyStopping,
    GradualUnfreezing,
    Hypergradient,
    PilotSearch,
)
from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.telemetry import Telemetry
from asg_env.instances import Instance
from asg_env.validation import ConfigError

INSTANCE = Instance("ASG/Digits-v0", 3, 4)
NAN = (math.nan,) * 3
WINDOWS = (4,) * 6
NEW = ("auto-rgn", "lars", "hypergradient", "gradual-unfreezing", "early-stopping", "pilot-search")


def stub_trainer(groups=3, losses=(), weight_decay=0.0, total_steps=100):
    """Stands in for a trainer: each window is one step, inner_valid's losses are given.

    `done` records what was asked of it; a snapshot's "weights" are the step it was taken at.
    """
    left = iter(losses)
    stub = SimpleNamespace(
        layer_groups=tuple(range(groups)),
        settings=SimpleNamespace(
            weight_decay=weight_decay, total_steps=total_steps, optimizer="sgd"
        ),
        splits={"inner_valid": SimpleNamespace(labels=())},
        inner_step=0,
        done=[],
    )

    def run(steps, multipliers):
        stub.inner_step += steps
        stub.done.append(("run", steps, *multipliers))
        return report(diverged=multipliers[0] > 0.9)

    stub.run = run
    stub.evaluate = lambda split: SimpleNamespace(loss=next(left, 1.0))
    stub.snapshot = lambda: {
        "weights": stub.inner_step,
        "optimizer": f"of step {stub.inner_step}",
        "inner_step": stub.inner_step,
    }
    stub.restore = lambda snapshot: stub.done.append(("restore", snapshot))
    return stub


def report(grads=NAN, weights=NAN, alignments=NAN, diverged=False):
    return Telemetry(
        ce=math.nan,
        kl=math.nan,
        objective=math.nan,
        head_mean=math.nan,
        head_std=math.nan,
        grad_norms=grads,
        drifts=NAN,
        update_ratios=NAN,
        weight_norms=weights,
        alignments=alignments,
        diverged=diverged,
        cause="",
    )


def rows_under(controller, reports, trainer=None):
    """Multipliers before the first window and after each report."""
    trainer = trainer or stub_trainer()
    controller.begin(INSTANCE, trainer)
    rows = []
    for index, telemetry in enumerate([None, *reports]):
        trainer.inner_step = index
        progress = index / trainer.settings.total_steps
        rows.append(list(controller.multipliers(progress, telemetry)))
    return rows


@pytest.fixture(scope="module")
def digits():
    """The digits trainer over a few windows, shared: reset it before use."""
    settings = EnvSettings(horizon=len(WINDOWS), inner_steps=WINDOWS[0], outer_valid_size=50)
    return build_trainer("ASG/Digits-v0", settings)


def weights_of(trainer):
    return [t.clone() for t in trainer.optimizee.state_dict().values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_auto_rgn_gives_the_top_to_the_largest_relative_gradient():
    # Ratios 0.1, 0.2 and 0.6; then 2, 0 and 1.
    reports = [
        report((1.0, 2.0, 3.0), (10.0, 10.0, 5.0)),
        report((4.0, 0.0, 5.0), (2.0, 10.0, 5.0)),
    ]
    rows = rows_under(AutoRGN(0.3), reports)
    assert rows[0] == [0.3] * 3
    assert rows[1] == pytest.approx([0.05, 0.1, 0.3])
    assert rows[2] == pytest.approx([0.3, 0.0, 0.15])


def test_lars_follows_the_trust_ratios_at_the_coefficient_of_the_first_window():
    # With weight decay 0.1 the pulls are 2, 4, 1 and then 1, 2, 4: trust ratios 5, 2.5, 4 and
    # 10, 5, 1. The coefficient is 0.6 / 5 = 0.12; the first group would get 1.2.
    reports = [
        report((1.0, 3.0, 0.6), (10.0, 10.0, 4.0)),
        report((0.0, 1.0, 3.6), (10.0, 10.0, 4.0)),
    ]
    rows = rows_under(LARS(0.6), reports, stub_trainer(weight_decay=0.1))
    assert rows[0] == [0.6] * 3
    assert rows[1] == pytest.approx([0.6, 0.3, 0.48])
    assert rows[2] == pytest.approx([1.0, 0.6, 0.12])


def test_lars_sets_its_coefficient_at_the_first_report_that_is_finite():
    reports = [report(), report((1.0, 2.0, 4.0), (4.0, 4.0, 4.0))]
    rows = rows_under(LARS(0.8), reports)
    assert rows[:2] == [[0.8] * 3] * 2
    assert rows[2] == pytest.approx([0.8, 0.4, 0.2])


def test_hypergradient_doubles_and_halves_within_its_bounds():
    reports = [report(alignments=(1.0, -1.0, 0.0)), report(alignments=(1.0, -1.0, 0.5))]
    rows = rows_under(Hypergradient(0.4, rate=math.log(2)), reports)
    assert rows[0] == [0.4] * 3
    assert rows[1] == pytest.approx([0.8, 0.2, 0.4])
    assert rows[2] == pytest.approx([1.0, 0.1, 0.4 * math.sqrt(2)])
    low = rows_under(Hypergradient(0.003, rate=math.log(2)), [report(alignments=(-1.0,) * 3)] * 3)
    assert [row[0] for row in low] == pytest.approx([0.003, 0.0015, 0.001, 0.001])


def test_hypergradient_keeps_the_groups_whose_alignment_is_not_finite():
    rows = rows_under(Hypergradient(0.4), [report(alignments=(math.nan, 0.0, -math.inf))])
    assert rows[1] == [0.4] * 3


@pytest.mark.parametrize(
    ("progress", "frozen"),
    [(0.0, 4), (0.124, 4), (0.125, 3), (0.3, 2), (0.375, 1), (0.499, 1), (0.5, 0), (1.0, 0)],
)
def test_gradual_unfreezing_adds_a_group_at_equal_parts_of_its_share(progress, frozen):
    controller = GradualUnfreezing(0.1, share=0.5)
    controller.begin(INSTANCE, stub_trainer(groups=5))
    assert controller.multipliers(progress, None) == [0.0] * frozen + [0.1] * (5 - frozen)


def test_gradual_unfreezing_meets_thresholds_that_floats_miss():
    controller = GradualUnfreezing(0.1, share=0.2)  # (1 - 0.15 / 0.2) * 4 is more than 1
    controller.begin(INSTANCE, stub_trainer(groups=5))
    frozen = [list(controller.multipliers(k / 20, None)).count(0.0) for k in range(6)]
    assert frozen == [4, 3, 2, 1, 0, 0]


def test_gradual_unfreezing_of_no_share_or_of_one_group_trains_all_at_once():
    for controller, groups in ((GradualUnfreezing(0.1, share=0.0), 4), (GradualUnfreezing(0.1), 1)):
        controller.begin(INSTANCE, stub_trainer(groups))
        assert controller.multipliers(0.0, None) == [0.1] * groups


def test_early_stopping_goes_back_after_two_windows_without_a_fall():
    # The loss after windows 1 to 6: the lowest is that of window 3, 4 and 5 do not reach it.
    trainer = stub_trainer(losses=[2.0, math.nan, 1.0, 1.5, 1.0, 0.1])
    rows = rows_under(EarlyStopping(0.3), [report()] * 6, trainer)
    assert rows == [[0.3] * 3] * 5 + [[0.0] * 3] * 2
    # The weights of window 3 at the time of window 5, with the optimizer as at the start.
    best = {"weights": 3, "optimizer": "of step 0", "inner_step": 5}
    assert trainer.done == [("restore", best)]


@pytest.mark.parametrize(
    ("losses", "restored"),
    [([2.0, 1.0, 1.5], [2]), ([2.0, 1.0, 0.5], []), ([math.nan] * 3, [])],
)
def test_early_stopping_settles_before_the_last_window(losses, restored):
    trainer = stub_trainer(losses=losses, total_steps=4)
    rows = rows_under(EarlyStopping(0.3, patience=9), [report()] * 3, trainer)
    assert [snapshot["weights"] for _, snapshot in trainer.done] == restored
    assert rows[3] == [0.0 if restored else 0.3] * 3


@pytest.mark.parametrize("form", ["pytorch", "scaled-velocity"])
@pytest.mark.parametrize(
    ("top", "patience", "stop", "best"),
    [
        (0.1, 2, 5, 3),  # after window 5 the loss has not fallen below that of window 3 twice
        (0.1, 5, 7, 6),  # before the last window, 8, which is not taken: 6 was better than 7
        (0.03, 2, 8, 8),  # the loss falls all the time
    ],
)
def test_early_stopping_ends_at_the_best_weights_it_has_read(form, top, patience, stop, best):
    settings = EnvSettings(horizon=8, inner_steps=2, outer_valid_size=50, momentum_form=form)
    trainer = build_trainer("ASG/Digits-v0", settings)
    trainer.reset(INSTANCE.head_seed, INSTANCE.data_seed)
    losses, states = [], []
    for length in settings.windows():
        trainer.run(length, [top] * 5)
        losses.append(trainer.evaluate("inner_valid").loss)
        states.append(weights_of(trainer))

    records = fit(trainer, EarlyStopping(top, patience), INSTANCE, settings.windows())

    assert trainer.evaluate("inner_valid").loss == losses[best - 1] == min(losses[:stop])
    assert same(weights_of(trainer), states[best - 1])
    assert trainer.inner_step == 16
    multipliers = [record["lr_multipliers"] for record in records]
    assert multipliers == [[top] * 5] * stop + [[0.0] * 5] * (8 - stop)


def test_pilot_search_takes_the_lowest_loss_and_the_lower_level_of_equals():
    # Levels from low to high; 1.0 diverges, so its loss is never read.
    trainer = stub_trainer(losses=[3.0, 2.0, 1.0, 1.0, math.nan, 0.0])
    rows = rows_under(PilotSearch(steps=7), [report()], trainer)
    assert rows == [[0.03] * 3] * 2
    assert [step[1:] for step in trainer.done if step[0] == "run"] == [
        (7, *[m] * 3) for m in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    ]
    assert [step[1]["weights"] for step in trainer.done if step[0] == "restore"] == [0] * 6


def test_pilot_search_takes_the_lowest_level_when_all_fail():
    rows = rows_under(PilotSearch(), [], stub_trainer(losses=[math.nan] * 6))
    assert rows == [[0.003] * 3]


def test_pilot_search_counts_its_inner_steps():
    assert PilotSearch(steps=7).extra_inner_steps == 42


def test_pilot_search_leaves_the_trainer_where_it_was(digits):
    digits.reset(INSTANCE.head_seed, INSTANCE.data_seed, 0.5)
    before = weights_of(digits)
    expected = digits.run(4, [0.1] * 5)
    after = weights_of(digits)
    digits.reset(INSTANCE.head_seed, INSTANCE.data_seed, 0.5)

    PilotSearch(steps=3).begin(INSTANCE, digits)

    assert same(weights_of(digits), before)
    assert digits.inner_step == 0
    assert digits.run(4, [0.1] * 5) == expected
    assert same(weights_of(digits), after)


def test_pilot_search_trains_with_the_level_that_is_best_on_its_own(digits):
    losses = {}
    for level in LEVELS:
        digits.reset(INSTANCE.head_seed, INSTANCE.data_seed)
        digits.run(10, [level] * 5)
        losses[level] = digits.evaluate("inner_valid").loss
    assert math.isnan(losses[1.0])  # a pilot that diverges
    best = min(LEVELS[1:], key=losses.get)

    records = fit(digits, PilotSearch(), INSTANCE, WINDOWS)

    assert records == fit(digits, Static((best,) * 5), INSTANCE, WINDOWS)


@pytest.mark.parametrize("rule", ["early-stopping", "pilot-search"])
@pytest.mark.parametrize("splits", [{}, {"inner_valid": SimpleNamespace(labels=None)}])
def test_rules_that_read_inner_valid_say_so_where_it_is_missing(rule, splits):
    trainer = stub_trainer()
    trainer.splits = splits
    with pytest.raises(ConfigError, match=f"'{rule}' needs labelled inner_valid images"):
        RULES[rule](3, 0.1).begin(INSTANCE, trainer)


def test_early_stopping_refuses_weights_that_move_at_rate_zero():
    trainer = stub_trainer()
    trainer.settings.optimizer = "schedule-free"
    with pytest.raises(ConfigError, match="cannot hold schedule-free weights"):
        EarlyStopping(0.1).begin(INSTANCE, trainer)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("rule", ["auto-rgn", "lars", "hypergradient"])
def test_rules_hold_still_when_the_report_says_nothing(rule, bad):
    good = report((1.0, 2.0, 3.0), (5.0, 5.0, 5.0), (0.1, 0.2, -0.3))
    broken = report(*[(bad,) * 3] * 3)
    rows = rows_under(RULES[rule](3, 0.3), [broken, good, broken])
    assert rows[1] == rows[0] == [0.3] * 3
    assert len(set(rows[2])) == 3
    assert rows[3] == rows[2]


@pytest.mark.parametrize("rule", RULES)
def test_rules_start_every_episode_afresh_and_stay_in_range(rule):
    reports = [
        report((1.0, 2.0, 3.0), (5.0, 5.0, 5.0), (0.9, 0.2, -0.9)),
        report(),
        report((3.0, 2.0, 1.0), (5.0, 1.0, 5.0), (-0.9, 0.2, 0.9)),
    ]
    controller = RULES[rule](3, 0.3)
    first, second = (
        rows_under(controller, reports, stub_trainer(losses=[1.0, 2.0, 3.0, 2.0, 2.0, 2.0]))
        for _ in range(2)
    )
    assert first == second
    assert all(math.isfinite(m) and 0 <= m <= 1 for row in first for m in row)


def test_rules_are_the_baselines_and_the_new_ones():
    assert set(RULES) == {*FAMILIES, *NEW}
    assert set(RULE_FAMILIES) == set(NEW)


def test_rules_hand_their_options_on():
    assert RULES["layer-decay"](3, 0.8, decay=0.5).vector == pytest.approx((0.2, 0.4, 0.8))
    assert RULES["frozen-backbone"](3, 0.8).vector == (0.0, 0.0, 0.8)
    assert RULES["hypergradient"](3, 0.8, rate=2.0) == Hypergradient(0.8, 2.0)
    assert RULES["gradual-unfreezing"](3, 0.8, share=0.2) == GradualUnfreezing(0.8, 0.2)
    assert RULES["early-stopping"](3, 0.8, patience=5) == EarlyStopping(0.8, 5)
    assert RULES["pilot-search"](3, steps=20) == PilotSearch(20)
    with pytest.raises(TypeError, match="rate"):
        RULES["auto-rgn"](3, 0.8, rate=2.0)


@pytest.mark.parametrize("family", RULE_FAMILIES)
def test_rule_families_make_each_candidate_anew(family):
    first, second = RULE_FAMILIES[family](3), RULE_FAMILIES[family](3)
    assert first == second
    assert all(first[name] is not second[name] for name in first)
    if family != "pilot-search":
        assert [first[f"{m:g}"].top for m in LEVELS] == list(LEVELS)


@pytest.mark.parametrize("family", RULE_FAMILIES)
def test_rule_families_train_a_network(family, digits):
    controller = list(RULE_FAMILIES[family](5).values())[-1]
    records = fit(digits, controller, INSTANCE, WINDOWS)
    assert [record["inner_step"] for record in records] == [4, 8, 12, 16, 20, 24]
    assert not records[-1]["diverged"]
