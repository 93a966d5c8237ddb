import math

import pytest

from asg_env.rewards import DEFAULT_REWARD, LOSS_BOUND, REWARD_TERMS, Measurements, Reward

BEFORE = Measurements(
    accuracy={"outer_valid": 0.3, "inner_valid": 0.5},
    loss={"outer_valid": 1.6, "inner_valid": 1.2},
    agreement=0.9,
    objective=1.4,
)
NOW = Measurements(
    accuracy={"outer_valid": 0.45, "inner_valid": 0.4},
    loss={"outer_valid": 1.1, "inner_valid": 1.3},
    agreement=0.8,
    objective=1.0,
)
EXPECTED = {
    "gain": 0.15,
    "level": 0.45,
    "terminal": 0.0,
    "loss": -1.1,
    "inner_valid_gain": -0.1,
    "inner_valid_level": 0.4,
    "inner_valid_terminal": 0.0,
    "inner_valid_loss": -1.3,
    "retention": -0.1,
    "train_loss": 0.4,
}


def test_reward_terms_follow_their_definitions():
    reward = Reward(dict.fromkeys(REWARD_TERMS, 1.0))

    assert reward.terms(NOW, BEFORE, last=False) == pytest.approx(EXPECTED)


def test_terminal_terms_pay_at_the_end_only():
    reward = Reward(dict.fromkeys(REWARD_TERMS, 1.0))

    assert reward.terms(NOW, BEFORE, last=True) == pytest.approx(
        EXPECTED | {"terminal": 0.45, "inner_valid_terminal": 0.4}
    )


def test_reward_total_adds_weighted_terms():
    reward = Reward({"gain": 2.0, "retention": -0.5})
    terms = reward.terms(NOW, BEFORE, last=False)

    assert set(terms) == {"gain", "retention"}
    assert reward.total(terms) == pytest.approx(2 * 0.15 - 0.5 * -0.1)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["gain"], ("outer_valid",)),
        (["inner_valid_loss", "level"], ("inner_valid", "outer_valid")),
        (["retention"], ("old_task",)),
        (["train_loss"], ()),
    ],
)
def test_reward_names_the_splits_that_it_reads(names, splits):
    assert Reward(dict.fromkeys(names, 1.0)).splits == splits


def test_no_reward_term_reads_the_test_split():
    assert {term.split for term in REWARD_TERMS.values()} == {
        "outer_valid",
        "inner_valid",
        "old_task",
        None,
    }


def test_default_reward_is_gain():
    assert DEFAULT_REWARD == "gain"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e9])
def test_reward_terms_bound_losses(loss):
    broken = Measurements(
        accuracy={"outer_valid": 0.0, "inner_valid": 0.0},
        loss={"outer_valid": loss, "inner_valid": loss},
        agreement=0.0,
        objective=loss,
    )

    terms = Reward(dict.fromkeys(REWARD_TERMS, 1.0)).terms(broken, BEFORE, last=True)

    assert all(map(math.isfinite, terms.values()))
    assert terms["loss"] == terms["inner_valid_loss"] == -LOSS_BOUND
    assert terms["train_loss"] == pytest.approx(1.4 - LOSS_BOUND)
