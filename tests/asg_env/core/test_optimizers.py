import copy
import sys

import numpy as np
import pytest
import torch

from asg_env.core.optimizers import ONE_RATE, ScaledVelocitySGD, build_optimizer, lr_factor


def trajectory(form, rates, gradient=lambda w: 1.0, start=0.0, **settings):
    """Weights after each step of a one-parameter problem, in double precision."""
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = build_optimizer([{"params": [weight], "lr": 1.0}], momentum_form=form, **settings)
    path = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([gradient(weight.item())], dtype=torch.float64)
        optimizer.step()
        path.append(weight.item())
    return path


def test_momentum_forms_reproduce_the_published_example():
    # docs/original.md, section 3: gradient 1, momentum 0.9, rate 0.1 for three steps, then 0.
    rates = [0.1] * 3 + [0.0] * 5

    assert np.round(trajectory("pytorch", rates), 3).tolist() == [
        -0.1, -0.29, -0.561, -0.561, -0.561, -0.561, -0.561, -0.561,
    ]  # fmt: skip
    assert np.round(trajectory("scaled-velocity", rates), 3).tolist() == [
        -0.1, -0.29, -0.561, -0.805, -1.024, -1.222, -1.4, -1.56,
    ]  # fmt: skip


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_momentum_forms_agree_at_a_constant_rate(momentum, weight_decay):
    settings = {"momentum": momentum, "weight_decay": weight_decay, "start": 2.0}
    paths = [
        trajectory(form, [0.1] * 50, np.cos, **settings) for form in ("pytorch", "scaled-velocity")
    ]

    np.testing.assert_allclose(paths[0], paths[1], rtol=1e-12)


def test_momentum_forms_part_when_the_rate_changes():
    rates = [0.1] * 3 + [0.01] * 3
    standard = trajectory("pytorch", rates)
    modified = trajectory("scaled-velocity", rates)

    np.testing.assert_allclose(standard[:3], modified[:3])
    assert min(np.abs(np.subtract(standard[3:], modified[3:]))) > 0.1


def test_scaled_velocity_follows_the_closed_form_of_a_quadratic():
    # f(w) = a/2 w**2: (w, v) is multiplied by one matrix in every step.
    a, rate, momentum, decay = 3.0, 0.05, 0.8, 0.2
    pull = rate * (a + decay)
    matrix = np.array([[1 - pull, -momentum], [pull, momentum]])
    expected = [(np.linalg.matrix_power(matrix, t) @ [1.0, 0.0])[0] for t in range(1, 31)]

    path = trajectory(
        "scaled-velocity", [rate] * 30, lambda w: a * w, 1.0, momentum=momentum, weight_decay=decay
    )

    np.testing.assert_allclose(path, expected, rtol=1e-12, atol=1e-15)


def test_scaled_velocity_uses_the_rate_when_momentum_is_zero():
    # Where the original applied the bare gradient (docs/original.md, section 3).
    assert trajectory("scaled-velocity", [0.1], momentum=0.0) == [-0.1]


def test_scaled_velocity_stops_weight_decay_at_rate_zero():
    path = trajectory("scaled-velocity", [0.0] * 3, lambda w: 0.0, 5.0, weight_decay=0.5)

    assert path == [5.0] * 3


def test_scaled_velocity_passes_over_parameters_without_gradient():
    moved, kept = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = ScaledVelocitySGD([{"params": [moved, kept]}, {"params": [torch.ones(1)]}], lr=0.5)
    moved.grad = torch.ones(2)

    optimizer.step()

    assert moved.tolist() == [0.5, 0.5]
    assert kept.tolist() == [1.0, 1.0]


def test_scaled_velocity_returns_the_loss_of_a_closure():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = ScaledVelocitySGD([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert weight.item() == pytest.approx(1.6)


def test_scaled_velocity_goes_on_from_its_state_dict():
    def build():
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, ScaledVelocitySGD([weight], lr=0.1)

    weight, optimizer = build()
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    twin, twin_optimizer = build()
    twin.data.copy_(weight.data)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, opt in ((weight, optimizer), (twin, twin_optimizer)):
        parameter.grad = torch.zeros(3)
        opt.step()

    assert torch.equal(weight, twin)


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [
        ("sgd", "pytorch", torch.optim.SGD),
        ("sgd", "scaled-velocity", ScaledVelocitySGD),
        ("adam", "pytorch", torch.optim.Adam),
        ("adamw", "pytorch", torch.optim.AdamW),
    ],
)
def test_build_optimizer_makes_the_named_one_with_its_settings(name, form, kind):
    group = {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.3}

    optimizer = build_optimizer([group], name, 0.7, form, 0.01)

    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("name", ["adam", "adamw", "prodigy", "schedule-free"])
def test_build_optimizer_refuses_scaled_velocity_beside_sgd(name):
    group = {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.3}

    with pytest.raises(ValueError, match=rf"must be 'pytorch' with optimizer '{name}'"):
        build_optimizer([group], name, momentum_form="scaled-velocity")


def test_lr_factor_is_one_when_constant():
    assert {lr_factor("constant", step, 50) for step in range(60)} == {1.0}


@pytest.mark.parametrize(
    ("step", "total", "expected"),
    [
        (0, 10_000, 0.01),
        (50, 10_000, (0.01 + 0.99 * 0.25) * (1 - 0.005) ** 0.9),
        (100, 10_000, 0.99**0.9),
        (5_000, 10_000, 0.5**0.9),
        (8_000, 10_000, 0.2**0.9),
    ],
)
def test_lr_factor_follows_the_formula(step, total, expected):
    assert lr_factor("warmup-poly", step, total) == pytest.approx(expected, rel=1e-12)


def test_lr_factor_never_falls_below_its_floor():
    after_warmup = [lr_factor("warmup-poly", step, 1_000) for step in range(100, 3_000)]

    assert min(after_warmup) == pytest.approx(0.2**0.9)
    assert round(min(after_warmup), 4) == 0.2349
    assert after_warmup == sorted(after_warmup, reverse=True)


def quadratic_path(optimizer, groups, rates, steps=12):
    """Weights of both groups after each step on sum(k * w**2), at the rates of each step."""
    path = []
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates(step), strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        sum((k * w**2).sum() for k, w in enumerate(groups, start=1)).backward()
        optimizer.step()
        path.append(torch.cat([w.detach().clone() for w in groups]))
    return torch.stack(path)


def two_groups():
    weights = [torch.nn.Parameter(torch.tensor(w)) for w in ([1.0, -2.0], [0.5, 3.0, -1.0])]
    return weights, [{"params": [w], "lr": 1.0, "name": str(i)} for i, w in enumerate(weights)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_prodigy_is_its_packages_own(weight_decay, capsys):
    package = pytest.importorskip("prodigyopt")
    weights, groups = two_groups()
    twins, twin_groups = two_groups()
    theirs = package.Prodigy(twin_groups, weight_decay=weight_decay)
    capsys.readouterr()
    ours = build_optimizer(groups, "prodigy", weight_decay=weight_decay)
    assert capsys.readouterr().out == ""

    def rates(step):
        return [0.0 if step < 3 else 1.0, 1.0]  # a frozen group may have rate 0

    path = quadratic_path(ours, weights, rates)

    assert torch.equal(path, quadratic_path(theirs, twins, rates))
    assert (path[-1] != path[0]).all()
    assert [group["name"] for group in ours.param_groups] == ["0", "1"]


def test_prodigy_refuses_different_rates_per_group():
    pytest.importorskip("prodigyopt")
    weights, groups = two_groups()
    optimizer = build_optimizer(groups, "prodigy")

    assert "prodigy" in ONE_RATE
    with pytest.raises(RuntimeError, match="different lr values"):
        quadratic_path(optimizer, weights, lambda step: [0.1, 1.0])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "schedule-free"])
def test_one_rate_names_no_optimizer_that_takes_several(name):
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    weights, groups = two_groups()
    path = quadratic_path(build_optimizer(groups, name), weights, lambda step: [0.01, 0.1])

    assert name not in ONE_RATE
    assert path.isfinite().all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_schedule_free_is_its_packages_own(weight_decay):
    package = pytest.importorskip("schedulefree")
    weights, groups = two_groups()
    twins, twin_groups = two_groups()
    ours = build_optimizer(groups, "schedule-free", momentum=0.8, weight_decay=weight_decay)
    theirs = package.SGDScheduleFree(twin_groups, momentum=0.8, weight_decay=weight_decay)
    theirs.train()

    def rates(step):
        return [0.01 * (step + 1), 0.1 if step < 6 else 0.0]

    path = quadratic_path(ours, weights, rates)

    assert torch.equal(path, quadratic_path(theirs, twins, rates))
    for optimizer in (ours, theirs):
        optimizer.eval()
    for weight, twin in zip(weights, twins, strict=True):
        assert torch.equal(weight, twin)
    assert not torch.equal(torch.cat([*weights]), path[-1])  # the average is another point


def test_schedule_free_averages_the_points_of_plain_sgd():
    # One weight, gradient 1 everywhere, rate 0.1: z is 0, -0.1, -0.2, -0.3 and x the mean of
    # the z so far, the start left out.
    pytest.importorskip("schedulefree")
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = build_optimizer([{"params": [weight], "lr": 0.1}], "schedule-free")
    averages = []
    for _ in range(3):
        weight.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        optimizer.eval()
        averages.append(weight.item())
        optimizer.train()

    assert averages == pytest.approx([-0.1, -0.15, -0.2])


@pytest.mark.parametrize(
    ("name", "package"), [("prodigy", "prodigyopt"), ("schedule-free", "schedulefree")]
)
def test_build_optimizer_names_the_package_that_is_missing(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ImportError) as error:
        build_optimizer(two_groups()[1], name)

    assert str(error.value) == (
        f"optimizer '{name}' needs the package {package}; pip install 'asg-env[rivals]'"
    )
