import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from asg_env.core.optimizers import ScaledVelocitySGD, lr_factor
from asg_env.schedule import LearnedSchedule


def sgd(model: nn.Module, learned: LearnedSchedule, base_lr: float | None = None):
    return torch.optim.SGD(learned.param_groups(model, base_lr), momentum=0.9)


def train_steps(model, optimizer, scheduler, steps, first=0) -> list[list[float]]:
    """Train on fixed data, `scheduler.step()` after every `optimizer.step()`; return the rates."""
    rates = []
    for step in range(first, first + steps):
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedule_lr_sets_the_rate_of_every_inner_step(make_schedule, make_network):
    model, learned = make_network(), make_schedule()
    optimizer = sgd(model, learned, base_lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a step in the wrong order
        rates = train_steps(model, optimizer, learned.to_torch(optimizer, total_steps=8), 8)
    expected = [[0.01 * m for m in learned.at(step / 8)] for step in range(8)]
    assert rates == expected


@pytest.mark.parametrize("total", [1, 2, 3, 7, 15, 49, 150, 1000])
def test_schedule_lr_starts_windows_where_the_environment_did(total, make_schedule, make_network):
    # Knots are rounded fractions; comparing step / total with them would slip by one step.
    windows = min(total, 15)
    starts = [total * i // windows for i in range(windows)]
    learned = make_schedule(
        knots=tuple(start / total for start in starts),
        multipliers=tuple((float(i), 1.0) for i in range(windows)),
        spread=((0.0, 0.0),) * windows,
    )
    optimizer = sgd(make_network(), learned, base_lr=1.0)
    scheduler = learned.to_torch(optimizer, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    changes = [i for i in range(total) if i == 0 or seen[i] != seen[i - 1]]
    assert changes == starts


def test_schedule_lr_multiplies_the_common_factor(make_schedule, make_network):
    learned = make_schedule(lr_factor="warmup-poly", inner_steps=300)
    model = make_network()
    optimizer = sgd(model, learned, base_lr=0.01)
    rates = train_steps(model, optimizer, learned.to_torch(optimizer, 300), 300)
    for step in (0, 50, 99, 100, 200, 299):
        factor = lr_factor("warmup-poly", step, 300)
        assert rates[step] == pytest.approx([0.01 * m * factor for m in learned.at(step / 300)])
    assert rates[0][0] == pytest.approx(0.01 * 0.01)


def test_schedule_lr_holds_the_last_window_beyond_the_end(make_schedule, make_network):
    learned, model = make_schedule(), make_network()
    optimizer = sgd(model, learned, base_lr=0.01)
    rates = train_steps(model, optimizer, learned.to_torch(optimizer, 4), 10)
    assert rates[4:] == [[0.0, 0.004]] * 6


def test_schedule_lr_state_is_plain_numbers(make_schedule, make_network):
    learned = make_schedule()
    model = make_network()
    optimizer = sgd(model, learned)
    scheduler = learned.to_torch(optimizer, 8)
    train_steps(model, optimizer, scheduler, 3)
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["last_epoch"], state["total_steps"]) == (3, 8)


@pytest.mark.parametrize(
    "optimizer_first", [False, True], ids=["scheduler-first", "optimizer-first"]
)
@pytest.mark.parametrize(
    ("at", "kind"),
    [*((at, "SGD") for at in (0, 1, 3, 4, 7)), (3, "AdamW"), (3, "decay"), (3, "linear")],
)
def test_schedule_lr_resumes_midway_exactly(
    tmp_path, at, kind, optimizer_first, make_schedule, make_network
):
    learned = make_schedule(interpolation="linear" if kind == "linear" else "step")

    def make_optimizer(model):
        if kind in ("AdamW", "decay"):
            decay = 0.1 if kind == "decay" else None
            return torch.optim.AdamW(learned.param_groups(model, 0.01, weight_decay=decay))
        return sgd(model, learned, base_lr=0.01)

    def build():
        model = make_network()
        optimizer = make_optimizer(model)
        return model, optimizer, learned.to_torch(optimizer, 8)

    model, optimizer, scheduler = build()
    whole = train_steps(model, optimizer, scheduler, 8)
    expected = [p.clone() for p in model.parameters()]
    model, optimizer, scheduler = build()
    first = train_steps(model, optimizer, scheduler, at)
    stored = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    torch.save(stored, tmp_path / "checkpoint.pt")
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = make_network()
    model.load_state_dict(stored["model"])
    optimizer = make_optimizer(model)
    if optimizer_first:  # making a scheduler sets the rates of its first step
        optimizer.load_state_dict(stored["optimizer"])
        scheduler = learned.to_torch(optimizer, 8)
    else:
        scheduler = learned.to_torch(optimizer, 8)
        optimizer.load_state_dict(stored["optimizer"])
    scheduler.load_state_dict(stored["scheduler"])
    second = train_steps(model, optimizer, scheduler, 8 - at, first=at)
    assert first + second == whole
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("total", [0, -1, 1.5, True, "8", None])
def test_schedule_lr_refuses_a_length_that_is_none(total, make_schedule, make_network):
    learned = make_schedule()
    with pytest.raises(ValueError, match=r"`total_steps` must be an integer >= 1, got"):
        learned.to_torch(sgd(make_network(), learned), total)


def test_schedule_lr_refuses_groups_in_another_order(make_schedule, make_network):
    learned = make_schedule()
    groups = learned.param_groups(make_network())[::-1]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    with pytest.raises(ValueError, match=r"must be \['body', 'head'\], in this order, got"):
        learned.to_torch(optimizer, 8)


def test_schedule_lr_refuses_an_optimizer_without_its_groups(make_schedule, make_network):
    optimizer = torch.optim.SGD(make_network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got \[None\]; build it on schedule\.param_groups"):
        make_schedule().to_torch(optimizer, 8)


def test_schedule_lr_refuses_momentum_of_another_form(make_schedule, make_network):
    scaled = make_schedule(momentum_form="scaled-velocity")
    with pytest.raises(ValueError, match=r"momentum_form 'scaled-velocity', got SGD; use an"):
        scaled.to_torch(sgd(make_network(), scaled), 8)
    with pytest.raises(ValueError, match=r"momentum_form 'scaled-velocity', got Adam"):
        scaled.to_torch(torch.optim.Adam(scaled.param_groups(make_network())), 8)
    plain = make_schedule()
    velocity = ScaledVelocitySGD(plain.param_groups(make_network()))
    with pytest.raises(ValueError, match=r"momentum_form 'pytorch', got ScaledVelocitySGD"):
        plain.to_torch(velocity, 8)
    velocity = ScaledVelocitySGD(scaled.param_groups(make_network()))
    assert scaled.to_torch(velocity, 8).total_steps == 8


# Trainings of other lengths


def rates_over(optimizer, scheduler, steps) -> list[list[float]]:
    """Rates of every inner step; nothing is trained."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedule_lr_stretches_warm_up_and_decay_with_the_training(make_schedule, make_network):
    learned = make_schedule(lr_factor="warmup-poly", inner_steps=300)
    optimizer = sgd(make_network(), learned, base_lr=0.01)
    rates = rates_over(optimizer, learned.to_torch(optimizer, 600), 600)
    for step in (0, 50, 100, 399, 599):
        factor = lr_factor("warmup-poly", step / 2, 300)
        assert rates[step] == pytest.approx([0.01 * m * factor for m in learned.at(step / 600)])


def test_schedule_lr_says_when_it_is_squeezed(make_schedule, make_network):
    learned = make_schedule(inner_steps=150)
    optimizer = sgd(make_network(), learned)
    with pytest.warns(UserWarning, match="over 150 inner steps and is squeezed into 50") as caught:
        learned.to_torch(optimizer, 50)
    assert caught[0].filename == __file__  # it points at the line that asked for it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned.to_torch(optimizer, 150)


@pytest.mark.parametrize("interpolation", ["linear", "log-linear"])
def test_schedule_lr_goes_from_knot_to_knot(make_schedule, make_network, interpolation):
    learned = make_schedule(interpolation=interpolation)
    optimizer = sgd(make_network(), learned, base_lr=0.01)
    rates = rates_over(optimizer, learned.to_torch(optimizer, 16), 16)
    for step in range(16):
        assert rates[step] == pytest.approx([0.01 * m for m in learned.at(step / 16)])
    assert len({row[0] for row in rates[:9]}) == 9


def test_schedule_lr_with_accumulated_gradients_counts_steps_of_the_optimizer(
    make_schedule, make_network
):
    learned = make_schedule()
    whole, parts = make_network(), make_network()
    for model, pieces in ((whole, 1), (parts, 4)):
        optimizer = sgd(model, learned, base_lr=0.01)
        scheduler = learned.to_torch(optimizer, 8)
        for _epoch in range(2):
            for step in range(4):
                inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                for part in inputs.chunk(pieces):
                    (model(part).square().sum() / 8).backward()
                optimizer.step()
                scheduler.step()
        assert scheduler.last_epoch == 8
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# Optimizers


def test_schedule_lr_drives_groups_that_were_split_by_decay(make_schedule, make_network):
    learned = make_schedule()
    groups = learned.param_groups(make_network(), base_lr=0.01, weight_decay=0.1)
    optimizer = torch.optim.SGD(groups)
    rates = rates_over(optimizer, learned.to_torch(optimizer, 8), 8)
    for step, row in enumerate(rates):
        body, head = (0.01 * m for m in learned.at(step / 8))
        assert row == [body, body, head, head]


def test_what_timm_spares_of_decay_is_spared(make_schedule):
    vit = pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", num_classes=2, embed_dim=12, depth=3, num_heads=2
    )
    names = {id(p): name for name, p in vit.named_parameters()}
    groups = make_schedule().by_depth(vit).param_groups(vit, weight_decay=0.05)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {n for n, p in vit.named_parameters() if p.ndim > 1} - vit.no_weight_decay()


def test_schedule_lr_refuses_a_group_that_comes_back(make_schedule, make_network):
    learned = make_schedule()
    body, head = learned.param_groups(make_network())
    weight, bias = ({**body, "params": [p]} for p in body["params"])
    with pytest.raises(ValueError, match=r"in this order, got \['body', 'head', 'body'\]"):
        learned.to_torch(torch.optim.SGD([weight, head, bias]), 8)


def test_schedule_lr_writes_rates_that_are_tensors_in_place(make_schedule, make_network):
    learned = make_schedule()
    groups = learned.param_groups(make_network(), base_lr=0.25)
    groups = [{**g, "lr": torch.tensor(0.25)} for g in groups]
    optimizer = torch.optim.SGD(groups)
    held = [group["lr"] for group in optimizer.param_groups]
    scheduler = learned.to_torch(optimizer, 8)
    assert rates_over(optimizer, scheduler, 8)[2] == [0.125, pytest.approx(0.05)]
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    scheduler.load_state_dict(state)
    assert all(g["lr"] is lr for g, lr in zip(optimizer.param_groups, held, strict=True))


def test_one_tensor_for_all_rates_is_refused(make_schedule, make_network):
    learned, rate = make_schedule(), torch.tensor(0.25)
    groups = [{**g, "lr": rate} for g in learned.param_groups(make_network())]
    with pytest.raises(ValueError, match="learning rate of their own, got one tensor as the `lr`"):
        learned.to_torch(torch.optim.SGD(groups), 8)


class Named:
    """Makes an optimizer of a class with a given name, as packages that are not here have it."""

    def __new__(cls, name, groups, **defaults):
        return type(name, (torch.optim.SGD,), {})([{**g, **defaults} for g in groups])


@pytest.mark.parametrize(
    ("name", "defaults", "message"),
    [
        ("Prodigy", {}, "Prodigy cannot take a rate .* one step length for all groups"),
        ("DAdaptAdam", {}, "DAdaptAdam cannot take a rate .* for all groups"),
        ("Adafactor", {"relative_step": True}, "relative_step makes it set its own rate"),
        ("LBFGS", {}, "LBFGS cannot take a rate .* all parameters as one group"),
    ],
)
def test_schedule_lr_refuses_optimizers_without_rates_by_group(
    make_schedule, make_network, name, defaults, message
):
    learned = make_schedule()
    optimizer = Named(name, learned.param_groups(make_network(), 0.1), **defaults)
    with pytest.raises(ValueError, match=message):
        learned.to_torch(optimizer, 8)


def test_schedule_lr_refuses_rprop(make_schedule, make_network):
    learned = make_schedule()
    optimizer = torch.optim.Rprop(learned.param_groups(make_network(), 0.1))
    with pytest.raises(ValueError, match="Rprop cannot take a rate .* step length for every weig"):
        learned.to_torch(optimizer, 8)


def test_schedule_lr_drives_groups_whose_rates_were_edited(make_schedule, make_network):
    learned = make_schedule()
    groups = learned.param_groups(make_network(), base_lr=0.1)
    groups[-1]["lr"] = 0.5
    optimizer = torch.optim.SGD(groups)
    assert rates_over(optimizer, learned.to_torch(optimizer, 8), 1) == [
        [0.1 * learned.multipliers[0][0], 0.5 * learned.multipliers[0][1]]
    ]


def test_schedule_lr_takes_one_rate_for_all_where_the_schedule_has_one(make_schedule, make_network):
    rows = ((1.0, 1.0), (0.5, 0.0), (0.1, 0.1))
    learned = make_schedule(multipliers=rows, optimizer="prodigy")
    groups = learned.param_groups(make_network(), base_lr=1.0)
    optimizer = pytest.importorskip("prodigyopt").Prodigy(groups)
    model_rates = rates_over(optimizer, learned.to_torch(optimizer, 8), 1)
    assert model_rates == [[1.0, 1.0]]
    between = learned.with_changes(interpolation="linear")  # from (.5, 0) to (.1, .1) it differs
    with pytest.raises(ValueError, match="one step length for all groups"):
        between.to_torch(Named("Prodigy", groups), 8)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "NAdam", "Adagrad", "Adafactor"])
def test_schedule_lr_drives_other_optimizers_and_warns_of_the_base_rate(
    make_schedule, make_network, name
):
    learned = make_schedule()
    optimizer = getattr(torch.optim, name)(learned.param_groups(make_network()))
    with pytest.warns(UserWarning, match=f"0.3 was learned with sgd and is used with {name}"):
        learned.to_torch(optimizer, 8)
    optimizer = getattr(torch.optim, name)(learned.param_groups(make_network(), base_lr=0.001))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = learned.to_torch(optimizer, 8)
    assert rates_over(optimizer, scheduler, 8)[7] == [0.0, 0.001 * 0.4]


def test_schedule_lr_trains_schedule_free(make_schedule, make_network):
    learned, model = make_schedule(optimizer="schedule-free"), make_network()
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.SGDScheduleFree(learned.param_groups(model, 0.01), momentum=0.9)
    optimizer.train()
    rates = train_steps(model, optimizer, learned.to_torch(optimizer, 8), 8)
    assert [row[0] for row in rates] == [0.01] * 2 + [0.005] * 2 + [0.0] * 4


def test_a_wrapped_optimizer_is_judged_by_what_it_wraps(make_schedule, make_network):
    learned = make_schedule()

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def __getattr__(self, name):
            return getattr(self.optimizer, name)

    wrapped = Wrapper(Named("Rprop", learned.param_groups(make_network())))
    with pytest.raises(ValueError, match="optimizer Rprop cannot take a rate"):
        learned.to_torch(wrapped, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 9}, "`total_steps` must be 9, as when the state was saved, got 8"),
        ({"base_lrs": [0.1]}, "the state must hold .* for 2 parameter groups"),
        ({"gamma": 0.1}, "the state must hold last_epoch, total_steps, schedule_digest, base_lrs"),
        ({"schedule_digest": 1}, "must be of the same schedule, got that of another"),
        ({"last_epoch": -5}, "`last_epoch` must be the inner steps done, an integer >= 0, got -5"),
        ({"last_epoch": 1.5}, "`last_epoch` must be the inner steps done, an .* got 1.5; give a"),
    ],
)
def test_schedule_lr_refuses_the_state_of_another(make_schedule, make_network, changes, message):
    learned = make_schedule()
    scheduler = learned.to_torch(sgd(make_network(), learned), 8)
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict({**scheduler.state_dict(), **changes})


@pytest.mark.parametrize("changes", [{"knots": (0.0, 0.2, 0.6)}, {"interpolation": "linear"}])
def test_schedules_that_differ_have_states_that_differ(make_schedule, make_network, changes):
    learned = make_schedule()
    other = learned.with_changes(**changes)
    state = learned.to_torch(sgd(make_network(), learned), 8).state_dict()
    with pytest.raises(ValueError, match="the same schedule, got that of another"):
        other.to_torch(sgd(make_network(), other), 8).load_state_dict(state)


def test_groups_that_were_added_later_are_told(make_schedule, make_network):
    pytest.importorskip("timm")
    learned = make_schedule()
    optimizer = sgd(make_network(), learned)
    scheduler, timms = learned.to_torch(optimizer, 8), learned.to_timm(optimizer, 8)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1})
    optimizer.step()
    for goes_on in (
        lambda: scheduler.load_state_dict(scheduler.state_dict()),
        scheduler.step,
        lambda: timms.step_update(1),
    ):
        with pytest.raises(ValueError, match="must have 2 parameter groups, .* got 3; add groups"):
            goes_on()


@pytest.mark.parametrize("value", [-1.0, float("nan"), True, "0.1"])
def test_weight_decay_out_of_range_is_told(make_schedule, make_network, value):
    with pytest.raises(ValueError, match="`weight_decay` must be a finite number >= 0, got"):
        make_schedule().param_groups(make_network(), weight_decay=value)


def test_whole_numbers_of_numpy_are_lengths(make_schedule, make_network):
    learned = make_schedule()
    for whole in (np.int64(8), torch.tensor(8)):
        assert learned.to_torch(sgd(make_network(), learned), whole).total_steps == 8
