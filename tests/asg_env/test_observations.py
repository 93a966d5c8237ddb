import dataclasses
import math

import numpy as np
import pytest

from asg_env.core.telemetry import Telemetry
from asg_env.observations import Observation

GROUPS = ("early", "late", "head")
TELEMETRY = Telemetry(
    ce=1.5,
    kl=0.05,
    objective=1.505,
    head_mean=0.01,
    head_std=0.2,
    grad_norms=(0.1, 1.0, 2.0),
    drifts=(0.0, 0.01, 0.5),
    update_ratios=(0.0, 0.001, 0.1),
    weight_norms=(1.0, 2.0, 3.0),
    alignments=(0.0, 0.5, -0.5),
    diverged=False,
    cause="",
)
STEP = {
    "previous_ce": 2.0,
    "progress": 0.4,
    "multipliers": (0.0, 0.03, 1.0),
    "inner_valid_loss": 0.7,
    "chance_loss": math.log(5),
}


def encode(name, telemetry=TELEMETRY, terms=(), **changed):
    observation = Observation(name, GROUPS, "log", terms)
    values = observation.encode(telemetry, **(STEP | changed))
    assert observation.space.contains(values)
    return dict(zip(observation.labels, values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        (
            "asg",
            ["ce", "kl", "progress", "head_mean", "head_std"]
            + ["multiplier/early", "multiplier/late", "multiplier/head"],
        ),
        (
            "scaled",
            ["log_ce", "log_ce_change", "log_kl", "progress"]
            + ["position/early", "position/late", "position/head"],
        ),
        (
            "extended",
            ["log_ce", "log_ce_change", "log_kl", "progress", "log_inner_valid_loss"]
            + ["position/early", "position/late", "position/head"]
            + ["log_grad_norm/early", "log_grad_norm/late", "log_grad_norm/head"]
            + ["log_drift/early", "log_drift/late", "log_drift/head"]
            + ["log_update_ratio/early", "log_update_ratio/late", "log_update_ratio/head"],
        ),
        (
            "normalised",
            ["log_ce", "log_ce_change", "log_kl", "progress", "log_inner_valid_loss"]
            + ["position/early", "position/late", "position/head"]
            + ["alignment/early", "alignment/late", "alignment/head"]
            + [f"log_relative_gradient/{group}" for group in GROUPS]
            + ["log_drift/early", "log_drift/late", "log_drift/head"]
            + ["log_update_ratio/early", "log_update_ratio/late", "log_update_ratio/head"],
        ),
    ],
)
def test_labels_name_every_entry_in_order(name, labels):
    observation = Observation(name, GROUPS, "log")

    assert list(observation.labels) == labels
    assert observation.space.shape == (len(labels),)
    assert observation.space.dtype == np.float32
    assert np.isfinite([observation.space.low, observation.space.high]).all()


def test_asg_holds_the_twelve_numbers_of_the_original_at_seven_groups():
    assert len(Observation("asg", [f"group{i}" for i in range(7)], "linear").labels) == 12


def test_asg_reports_raw_values():
    values = encode("asg")

    assert values == pytest.approx(
        {"ce": 1.5, "kl": 0.05, "progress": 0.4, "head_mean": 0.01, "head_std": 0.2}
        | {"multiplier/early": 0.0, "multiplier/late": 0.03, "multiplier/head": 1.0}
    )


def test_scaled_reports_logs_and_grid_positions():
    values = encode("scaled")

    log_ce, log_before = math.log(1.501) / 4, math.log(2.001) / 4
    assert values == pytest.approx(
        {
            "log_ce": log_ce,
            "log_ce_change": 4 * (log_ce - log_before),
            "log_kl": math.log(0.0501) / 5,
            "progress": 0.4,
            "position/early": -1.0,
            "position/late": 0.0,
            "position/head": 1.0,
        },
        rel=1e-6,
    )


def test_extended_is_scaled_and_the_telemetry_of_each_group():
    values, scaled = encode("extended"), encode("scaled")

    assert {name: values[name] for name in scaled} == scaled
    rest = {name: value for name, value in values.items() if name not in scaled}
    expected = {"log_inner_valid_loss": math.log(0.701) / 4}
    for group, norm, drift, ratio in zip(
        GROUPS, TELEMETRY.grad_norms, TELEMETRY.drifts, TELEMETRY.update_ratios, strict=True
    ):
        expected[f"log_grad_norm/{group}"] = math.log(norm + 1e-3) / 4
        expected[f"log_drift/{group}"] = 1 + math.log(drift + 1e-4) / 5
        expected[f"log_update_ratio/{group}"] = 1 + math.log(ratio + 1e-4) / 5
    assert rest == pytest.approx(expected, rel=1e-5)


def test_only_extended_needs_the_inner_valid_loss():
    needs = {name: Observation(name, GROUPS, "log").needs_inner_valid
             for name in ("asg", "scaled", "extended")}  # fmt: skip

    assert needs == {"asg": False, "scaled": False, "extended": True}


@pytest.mark.parametrize("name", ["asg", "scaled", "extended"])
def test_encode_clips_large_values_to_the_space(name):
    huge = dataclasses.replace(
        TELEMETRY, ce=1e30, kl=1e30, head_mean=-1e30, head_std=1e30, grad_norms=(1e30,) * 3
    )

    values = encode(name, huge, multipliers=(1e9,) * 3)

    bounds = Observation(name, GROUPS, "log").space
    assert values[next(iter(values))] == bounds.high[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["asg", "scaled", "extended"])
def test_encode_is_finite_when_telemetry_is_not(name, bad):
    broken = Telemetry(*[bad] * 5, *[(bad,) * 3] * 5, True, "a training loss is not finite")

    values = encode(name, broken, inner_valid_loss=bad)

    assert all(map(math.isfinite, values.values()))
    assert values["progress"] == pytest.approx(0.4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["asg", "scaled", "extended"])
def test_encode_is_finite_when_losses_are_zero(name):
    zeros = Telemetry(*[0.0] * 5, *[(0.0,) * 3] * 5, False, "")

    values = encode(name, zeros, previous_ce=0.0, progress=0.0, inner_valid_loss=0.0)

    assert all(map(math.isfinite, values.values()))


def test_extended_observation_holds_every_guidance_term():
    telemetry = dataclasses.replace(TELEMETRY, guidance={"weight_l2": 0.3, "ewc": 0.0})

    values = encode("extended", telemetry, terms=("weight_l2", "ewc"))

    assert values["log_weight_l2"] == pytest.approx(math.log(0.3001) / 5)
    assert values["log_ewc"] == pytest.approx(math.log(1e-4) / 5)
    without = encode("extended")
    assert values | without == values  # the rest is where it was
    assert "log_weight_l2" not in encode("scaled", telemetry, terms=("weight_l2", "ewc"))


def test_normalised_has_losses_in_units_of_chance_and_gradients_in_units_of_weights():
    values = encode("normalised")

    assert values["log_ce"] == pytest.approx(math.log(1.5 / math.log(5) + 1e-3) / 4)
    assert values["log_inner_valid_loss"] == pytest.approx(math.log(0.7 / math.log(5) + 1e-3) / 4)
    assert [values[f"alignment/{group}"] for group in GROUPS] == [0.0, 0.5, -0.5]
    assert values["log_relative_gradient/late"] == pytest.approx(math.log(1.0 / 2.0 + 1e-3) / 4)
    assert values["log_drift/head"] == encode("extended")["log_drift/head"]


def test_normalised_does_not_change_with_width_or_number_of_classes():
    wider = dataclasses.replace(
        TELEMETRY,
        ce=TELEMETRY.ce * 2,
        grad_norms=tuple(3 * norm for norm in TELEMETRY.grad_norms),
        weight_norms=tuple(3 * norm for norm in TELEMETRY.weight_norms),
    )
    other = {"previous_ce": 4.0, "inner_valid_loss": 1.4, "chance_loss": math.log(25)}

    assert encode("normalised", wider, **other) == pytest.approx(encode("normalised"), abs=1e-6)
    assert encode("extended", wider, **other) != pytest.approx(encode("extended"), abs=1e-2)


def test_normalised_gradient_is_finite_before_training():
    before = dataclasses.replace(TELEMETRY, grad_norms=(0.0,) * 3, weight_norms=(0.0,) * 3)

    assert encode("normalised", before)["log_relative_gradient/head"] == pytest.approx(
        math.log(1e-3) / 4
    )
