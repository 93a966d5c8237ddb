"""The live controller on small models: what it drives, and what it refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agents.controller_file import Controller
from agents.l2o_controller import L2OController
from asg_env.core.optimizers import ScaledVelocitySGD
from asg_env.schedule import LearnedSchedule

TASK = "ASG/Digits-v0"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


SMALL = {"horizon": 4, "inner_steps": 3, "outer_valid_size": 50}


def layers(count, width=3) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def groups_of(model, lr=0.1):
    return [
        {"params": [*layer.parameters()], "lr": lr, "name": f"layer{i}"}
        for i, layer in enumerate(model)
    ]


def small(controller, optimizer, total=6, **settings):
    return L2OController(
        optimizer, controller, total, **{"classes": 3, "inner_valid": lambda: 1.0, **settings}
    )


def train(model, optimizer, controller, steps, first=0):
    for step in range(first, first + steps):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step(ce=loss, kl=0.0)


@pytest.fixture
def normalised(make_settings, controller_for):
    return controller_for(make_settings(**{**SMALL, "observation": "normalised"}))


@pytest.mark.parametrize("count", [1, 5, 7, 30])
def test_a_coordinate_wise_controller_drives_any_number_of_groups(normalised, count):
    model = layers(count)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer)
    controller.begin(ce=1.0, kl=0.0)
    train(model, optimizer, controller, 6)
    assert len(controller.multipliers) == count
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.1 * m for m in controller.multipliers.values()]


def test_a_per_feature_controller_drives_its_own_number_of_groups(make_settings, controller_for):
    controller = controller_for(make_settings(**SMALL), "per-feature")
    with pytest.raises(ValueError, match=r"is for 5 layer groups .*, got 7; train a coordinate"):
        small(controller, torch.optim.SGD(groups_of(layers(7))))


def test_groups_in_another_order_are_refused(make_settings, controller_for):
    for kind in ("per-feature", "coordinate-wise"):
        controller = controller_for(make_settings(**SMALL), kind)
        names = list(controller.record.layer_groups)
        groups = groups_of(layers(5))
        swapped = [*names[:3], names[4], names[3]]
        named = [{**g, "name": n} for g, n in zip(groups, swapped, strict=True)]
        with pytest.raises(ValueError, match=r"in the order \['conv1', .* 'head'\], input to head"):
            small(controller, torch.optim.SGD(named))


def test_the_head_of_the_training_is_not_the_first_of_other_groups(normalised):
    names = ["head", "block1", "block0"]  # as of a ResNet by depth, turned round
    named = [{**g, "name": n} for g, n in zip(groups_of(layers(3)), names, strict=True)]
    with pytest.raises(ValueError, match=r"input to head, with 'head' last, .* got \['head', 'bl"):
        small(normalised, torch.optim.SGD(named))
    small(normalised, torch.optim.SGD(named[::-1]))


@pytest.mark.parametrize("named", [0, 1])
def test_groups_without_a_name_are_no_layer_groups(normalised, named):
    decayed, spared = groups_of(layers(2))
    del spared["name"]
    groups = [decayed, spared] if named else [{"params": [*layers(2).parameters()], "lr": 0.1}]
    with pytest.raises(ValueError, match=rf"must have the `name` .* got {len(groups)} groups, 1 w"):
        small(normalised, torch.optim.SGD(groups))


def test_decisions_come_every_so_many_steps_where_that_is_said(normalised):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer, total=10, every=4)
    reports = Reports(controller)
    controller.begin(ce=1.0, kl=0.0)
    train(model, optimizer, controller, 12)
    np.testing.assert_allclose([progress for progress, _ in reports.seen], [0, 0.4, 0.8])


def test_groups_that_were_split_by_decay_are_one_layer_group(normalised):
    model = layers(2)
    split = [
        {"params": [p], "lr": 0.1, "name": f"layer{i}"}
        for i, layer in enumerate(model)
        for p in layer.parameters()
    ]
    optimizer = torch.optim.SGD(split)
    controller = small(normalised, optimizer)
    assert controller.layer_groups == ("layer0", "layer1")
    controller.begin(ce=1.0, kl=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == rates[1]
    assert rates[2] == rates[3]
    with pytest.raises(ValueError, match=r"must be neighbours, got \['layer0', 'layer1', 'layer0'"):
        small(normalised, torch.optim.SGD([split[0], split[2], split[1]]))


def test_groups_that_a_schedule_split_by_decay_are_one_layer_group(normalised):
    schedule = LearnedSchedule.load(EXAMPLES / "schedule.json")
    model = torch.nn.ModuleDict({"backbone": layers(4), "head": torch.nn.Linear(3, 2)})
    optimizer = torch.optim.AdamW(schedule.param_groups(model, weight_decay=0.1))
    assert [g["name"] for g in optimizer.param_groups][:2] == ["conv1", "conv1/no_decay"]
    assert small(normalised, optimizer).layer_groups == tuple(schedule.layer_groups)


def test_a_diverged_training_is_no_error(normalised):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer)
    controller.begin(ce=1.0, kl=0.0)
    train(model, optimizer, controller, 2)
    before = controller.multipliers
    with torch.no_grad():
        model[0].weight.fill_(math.inf)
    train(model, optimizer, controller, 4)
    assert controller.diverged
    assert controller.multipliers == before


def test_a_loss_beyond_float32_is_a_diverged_training_too(normalised):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer, every=1)
    controller.begin(ce=1.0, kl=0.0)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    controller.step(ce=1e300, kl=0.0)
    assert controller.diverged


class Reports:
    """Keeps what a controller decides on: progress, and the report of the window."""

    def __init__(self, controller) -> None:
        self.seen, self._decide = [], controller._live.decide
        controller._live.decide = self

    def __call__(self, report, progress, *rest):
        self.seen.append((progress, report))
        return self._decide(report, progress, *rest)


def test_losses_may_be_overwritten_by_the_loop(normalised):
    found = []
    for fresh in (True, False):
        model, reused = layers(2), torch.zeros(())
        optimizer = torch.optim.SGD(groups_of(model))
        controller = small(normalised, optimizer)
        reports = Reports(controller)
        controller.begin(ce=1.0, kl=0.0)
        for step in range(4):
            loss = model(torch.full((1, 3), float(step))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reused.copy_(loss.detach())
            controller.step(ce=loss.item() if fresh else reused, kl=0.0)
            reused.fill_(99.0)
        found.append([report.ce for _, report in reports.seen])
    assert len(found[0]) > 2
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("total", "starts"),
    [
        (10, [0, 2, 5, 8]),  # as a schedule's windows
        (16, [0, 4, 8, 12]),
        (3, [0, 1, 2]),  # fewer steps than decisions
    ],
)
def test_decisions_are_as_many_as_in_training(normalised, total, starts):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer, total=total)
    reports = Reports(controller)
    controller.begin(ce=1.0, kl=0.0)
    train(model, optimizer, controller, total + 2)  # two beyond the end
    np.testing.assert_allclose([progress for progress, _ in reports.seen], np.array(starts) / total)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_does_not_count(normalised, fused):
    found = []
    for skipped in (False, True):
        model = layers(2)
        optimizer = torch.optim.SGD(groups_of(model), fused=fused)
        controller = small(normalised, optimizer, total=8, every=2)
        reports = Reports(controller)
        controller.begin(ce=1.0, kl=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        inputs = torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0))
        # Where a window ends, and within one.
        for step in (0, "overflow", 1, "overflow", 2, 3) if skipped else range(4):
            optimizer.zero_grad()
            if step == "overflow":
                loss = model(inputs[8]).square().mean() * math.inf
            else:
                loss = model(inputs[step]).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            controller.step(ce=loss, kl=0.0)
        assert not controller.diverged
        found.append(([r for _, r in reports.seen[1:]], controller.multipliers))
    assert found[0] == found[1]


def test_a_report_that_does_not_follow_one_step_is_told(normalised):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer)
    controller.begin(ce=1.0, kl=0.0)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="one step between two reports, got 0; call controller"):
        controller.step(ce=1.0, kl=0.0)
    optimizer.step()
    optimizer.step()
    with pytest.raises(ValueError, match="one step between two reports, got 2"):
        controller.step(ce=1.0, kl=0.0)


def test_losses_of_one_entry_are_numbers_and_larger_ones_are_told(normalised):
    controller = small(normalised, torch.optim.SGD(groups_of(layers(2))))
    with pytest.raises(ValueError, match=r"`kl` must be one number, got shape \(2,\); average it"):
        controller.begin(ce=1.0, kl=torch.zeros(2))
    controller.begin(ce=torch.ones(1), kl=0.0)


def test_weights_of_half_precision_are_told(normalised):
    model = layers(2).to(torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32 or float64, got torch.bfloat16; keep"):
        small(normalised, torch.optim.SGD(groups_of(model)))


def test_groups_that_are_added_later_are_told(normalised):
    model = layers(3)
    optimizer = torch.optim.SGD(groups_of(model)[:2])
    controller = small(normalised, optimizer)
    optimizer.add_param_group(groups_of(model)[2])
    with pytest.raises(ValueError, match="must have 2 parameter groups, .* got 3; add groups"):
        controller.begin(ce=1.0, kl=0.0)


def test_misuse_is_told(normalised, make_settings):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer, total=2, every=1)
    assert controller.multipliers == {"layer0": 0.01, "layer1": 0.01}  # where it starts from
    with pytest.raises(ValueError, match="has not begun; call begin"):
        controller.step(ce=1.0, kl=0.0)
    with pytest.raises(ValueError, match=r"terms beside ce and kl must be \[\].*got \['ewc'\]"):
        controller.begin(ce=1.0, kl=0.0, ewc=1.0)
    for loss in (math.nan, math.inf, torch.tensor(math.nan), 1e39, torch.tensor(1e300).double()):
        with pytest.raises(ValueError, match="`ce` of the untrained network must be a finite flo"):
            controller.begin(ce=loss, kl=0.0)
    for loss in (None, "1.0", 10**400):
        with pytest.raises(ValueError, match="`ce` must be one number or a tensor of one, got"):
            controller.begin(ce=loss, kl=0.0)
    controller.begin(ce=1.0, kl=0.0)
    with pytest.raises(ValueError, match="has begun; call begin"):
        controller.begin(ce=1.0, kl=0.0)
    optimizer.step()  # there is no gradient
    with pytest.raises(ValueError, match="gradients are gone; call controller.step"):
        controller.step(ce=1.0, kl=0.0)
    moved = small(normalised, optimizer, total=2, every=1)
    moved.begin(ce=1.0, kl=0.0)
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(ValueError, match="parameters are no longer where they were"):
        train(model, optimizer, moved, 1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (-1.0, "`inner_valid` must return a cross-entropy, >= 0, got -1.0; return the mean"),
        (None, "`inner_valid` must be one number or a tensor of one, got None"),
        ("1.0", "`inner_valid` must be one number or a tensor of one, got '1.0'"),
    ],
)
def test_what_inner_valid_returns_is_checked(normalised, returned, message):
    answers = [returned, 1.0]
    controller = small(
        normalised, torch.optim.SGD(groups_of(layers(2))), inner_valid=lambda: answers.pop(0)
    )
    with pytest.raises(ValueError, match=message):
        controller.begin(ce=1.0, kl=0.0)
    controller.begin(ce=1.0, kl=0.0)  # the training had not begun


def test_a_report_that_was_refused_may_be_given_again(normalised):
    model = layers(2)
    optimizer = torch.optim.SGD(groups_of(model))
    controller = small(normalised, optimizer)
    controller.begin(ce=model(torch.ones(4, 3)).sum(), kl=0.0)  # with its graph
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="`ce` must be one number"):
        controller.step(ce=None, kl=0.0)
    controller.step(ce=1.0, kl=0.0)
    assert controller.state_dict()["step"] == 1


def test_steps_before_the_first_decision_are_told(normalised):
    optimizer = torch.optim.SGD(groups_of(layers(2)))
    controller = small(normalised, optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=r"must not have taken a step before begin\(\), got 1"):
        controller.begin(ce=1.0, kl=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total": 0}, "`total_steps` must be an integer >= 1, got 0"),
        ({"every": 0}, "`every` must be an integer from 1 to 6, got 0"),
        ({"every": 7}, "`every` must be an integer from 1 to 6, got 7"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"classes": None}, "`classes` must be the number of classes"),
        ({"classes": 1}, "`classes` must be an integer >= 2, got 1"),
        ({"classes": math.nan}, "`classes` must be an integer >= 2, got nan"),
        ({"inner_valid": 1.3}, r"`inner_valid` must be a function .*, got 1.3; give one"),
        ({"inner_valid": None}, r"`inner_valid` must be a function .*\(normalised\), got None"),
    ],
)
def test_settings_that_are_missing_or_wrong_are_told(normalised, settings, message):
    with pytest.raises(ValueError, match=message):
        small(normalised, torch.optim.SGD(groups_of(layers(2))), **settings)


@pytest.mark.parametrize("name", ["Rprop", "Prodigy", "LBFGS"])
def test_optimizers_without_rates_by_group_are_refused(normalised, name):
    optimizer = type(name, (torch.optim.SGD,), {})(groups_of(layers(2)))
    with pytest.raises(ValueError, match=f"optimizer {name} cannot take a rate"):
        small(normalised, optimizer)


def test_momentum_of_another_form_is_refused(normalised):
    with pytest.raises(ValueError, match="momentum_form 'pytorch', got ScaledVelocitySGD"):
        small(normalised, ScaledVelocitySGD(groups_of(layers(2))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 7}, "`total_steps` must be 7, as when the state was saved, got 6"),
        ({"layer_groups": ["a"]}, r"`layer_groups` must be \['a'\].*got \['layer0', 'layer1'\]"),
        ({"controller": "another"}, "`controller` must be another, as when the state was saved"),
        ({"speed": 1}, r"for \['speed'\] it is not"),
    ],
)
def test_the_state_of_another_is_refused(normalised, changes, message):
    controller = small(normalised, torch.optim.SGD(groups_of(layers(2))))
    with pytest.raises(ValueError, match=message):
        controller.load_state_dict({**controller.state_dict(), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 10**9},
        {"step": -1},
        {"step": 1.5},
        {"step": True},
        {"multipliers": None},
        {"multipliers": [0.1]},
        {"multipliers": [math.nan, 0.1]},
        {"multipliers": [-0.1, 0.1]},
        {"multipliers": ["0.1", 0.1]},
        {"policy": torch.zeros(3)},
        {"policy": None},
        {"previous_ce": None},
        {"generator": None},
        {"diverged": "no"},
        {"records": None},
        {"records": [torch.zeros(3)] * 5},
        {"records": [torch.zeros(())] * 3},
        {"initial": torch.zeros(1)},
        {"marked": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_damaged_state_is_refused_and_nothing_is_changed(normalised, changes):
    states, controllers, optimizers = [], [], []
    for steps in (1, 4):
        model = layers(2)
        optimizers.append(torch.optim.SGD(groups_of(model)))
        controllers.append(small(normalised, optimizers[-1]))
        controllers[-1].begin(ce=1.0, kl=0.0)
        train(model, optimizers[-1], controllers[-1], steps)
        states.append(controllers[-1].state_dict())
    assert states[0]["step"] != states[1]["step"]
    rates = [group["lr"] for group in optimizers[1].param_groups]
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"^the state is damaged: {name} cannot be .* give one th"):
        controllers[1].load_state_dict({**states[0], **changes})
    assert [group["lr"] for group in optimizers[1].param_groups] == rates
    after = controllers[1].state_dict()
    for key, value in states[1].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[key], value), key
        else:
            assert after[key] == value, key
    controllers[1].load_state_dict(states[0])
    assert controllers[1].state_dict()["step"] == states[0]["step"]


def test_base_rates_that_are_tensors_are_kept_apart_from_the_rates(normalised):
    groups = [{**group, "lr": torch.tensor(0.25)} for group in groups_of(layers(2))]
    optimizer = torch.optim.Adam(groups)
    small(normalised, optimizer).begin(ce=1.0, kl=0.0)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert float(optimizer.param_groups[0]["lr"]) != 0.25


def test_one_tensor_for_all_rates_is_refused(normalised):
    rate = torch.tensor(0.25)
    groups = [{**group, "lr": rate} for group in groups_of(layers(2))]
    with pytest.raises(ValueError, match="got one tensor as the `lr` of several; give each group"):
        small(normalised, torch.optim.Adam(groups))


def test_further_terms_are_observed(make_settings, controller_for):
    settings = make_settings(
        **SMALL, observation="extended", guidance={"kl": 0.1, "weight_l2": 0.0}
    )
    controller = controller_for(settings)
    model, found = layers(5), []
    for value in (0.0, 50.0):
        optimizer = torch.optim.SGD(groups_of(model))
        live = small(controller, optimizer)
        with pytest.raises(ValueError, match=r"must be \['weight_l2'\].*got \[\]"):
            live.begin(ce=1.0, kl=0.0)
        live.begin(ce=1.0, kl=0.0, weight_l2=value)
        found.append(live.multipliers)
    assert found[0] != found[1]


def test_the_record_says_how_it_acts_unless_told_otherwise(normalised):
    drawn = Controller(normalised.record.model_copy(update={"greedy": False}), normalised.weights)
    optimizer = torch.optim.SGD(groups_of(layers(2)))
    states = [small(drawn, optimizer, **s).state_dict() for s in ({}, {"greedy": True})]
    assert [state["greedy"] for state in states] == [False, True]
