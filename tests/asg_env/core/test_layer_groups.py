import pytest
import torch
from torch import nn

from asg_env.core.layer_groups import (
    build_param_groups,
    effective_lrs,
    set_learning_rates,
    split_parameters,
)


@pytest.fixture
def model():
    return nn.ModuleDict(
        {"stem": nn.Linear(2, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 1)}
    )


PATTERNS = {"first": r"stem\.", "middle": r"body\.", "last": r"head\."}


def test_split_parameters_follows_the_order_of_the_patterns(model):
    groups = split_parameters(model, dict(reversed(PATTERNS.items())))

    assert list(groups) == ["last", "middle", "first"]
    assert [p is q for p, q in zip(groups["middle"], model["body"].parameters(), strict=True)]
    assert sum(map(len, groups.values())) == 6


def test_split_parameters_names_leftover_parameters(model):
    with pytest.raises(ValueError, match=r"match no layer group of .*: head\.weight, head\.bias"):
        split_parameters(model, {"first": r"stem\.", "middle": r"body\."})


def test_split_parameters_matches_at_the_start_of_the_name(model):
    with pytest.raises(ValueError, match=r"match no layer group .*: stem\.bias, .*head\.bias"):
        split_parameters(model, {"weights": r"\w+\.weight", "tails": r"bias"})


def test_split_parameters_names_ambiguous_parameters(model):
    with pytest.raises(ValueError, match=r"several layer groups: body\.weight \(middle, other\)"):
        split_parameters(model, PATTERNS | {"other": r"body\.weight"})


def test_split_parameters_names_empty_groups(model):
    with pytest.raises(ValueError, match=r"\['other'\] match no trainable parameter"):
        split_parameters(model, PATTERNS | {"other": r"neck\."})


def test_split_parameters_passes_over_frozen_parameters(model):
    model["body"].requires_grad_(False)

    groups = split_parameters(model, {"first": r"stem\.", "last": r"head\."})

    assert {name: len(parameters) for name, parameters in groups.items()} == {"first": 2, "last": 2}


def test_split_parameters_treats_a_group_of_frozen_parameters_as_empty(model):
    model["body"].requires_grad_(False)

    with pytest.raises(ValueError, match=r"\['middle'\] match no trainable parameter"):
        split_parameters(model, PATTERNS)


def test_build_param_groups_names_groups_and_sets_the_base_rate(model):
    groups = build_param_groups(model, PATTERNS, 0.2)

    assert [(g["name"], g["lr"]) for g in groups] == [
        ("first", 0.2),
        ("middle", 0.2),
        ("last", 0.2),
    ]
    torch.optim.SGD(groups)  # PyTorch takes them as they are


@pytest.mark.parametrize("base_lr", [0.0, -0.1, float("nan"), float("inf"), 1e40])
def test_build_param_groups_refuses_a_base_rate(model, base_lr):
    with pytest.raises(ValueError, match="`base_lr` must be a finite number > 0, at most"):
        build_param_groups(model, PATTERNS, base_lr)


def test_effective_lrs_multiplies_base_rate_multiplier_and_factor():
    assert effective_lrs(0.5, [0.0, 1.0, 0.25]) == [0.0, 0.5, 0.125]
    assert effective_lrs(0.5, [1.0], factor=0.25) == [0.125]


@pytest.mark.parametrize("multiplier", [-0.1, float("nan"), float("inf")])
def test_effective_lrs_refuses_a_multiplier(multiplier):
    with pytest.raises(ValueError, match=rf"must be finite and >= 0, got {multiplier}"):
        effective_lrs(0.1, [1.0, multiplier])


def test_set_learning_rates_writes_one_rate_per_group(model):
    optimizer = torch.optim.SGD(build_param_groups(model, PATTERNS, 0.2))

    set_learning_rates(optimizer, [0.1, 0.0, 0.3])

    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.0, 0.3]


def test_set_learning_rates_refuses_a_wrong_number_of_rates(model):
    optimizer = torch.optim.SGD(build_param_groups(model, PATTERNS, 0.2))

    with pytest.raises(ValueError, match="must have 2 parameter groups, .* got 3; add"):
        set_learning_rates(optimizer, [0.1, 0.1])
