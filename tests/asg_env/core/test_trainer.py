import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from asg_env.core import trainer as trainer_module
from asg_env.core.optimizers import lr_factor
from asg_env.core.seeding import torch_generator

ONES = (1.0, 1.0, 1.0)
OPTIMIZERS = {
    "sgd": {},
    "sgd-scaled-velocity": {"momentum_form": "scaled-velocity"},
    "adam": {"optimizer": "adam", "base_lr": 0.01},
    "adamw": {"optimizer": "adamw", "base_lr": 0.01},
}


@pytest.fixture(params=OPTIMIZERS)
def optimizer_settings(request):
    return OPTIMIZERS[request.param] | {"weight_decay": 0.01}


def sgd_by_hand(parameters, momentum, weight_decay):
    buffers = [torch.zeros_like(p) for p in parameters]

    def update(gradients, rate):
        for p, buffer, gradient in zip(parameters, buffers, gradients, strict=True):
            buffer.mul_(momentum).add_(gradient.add(p, alpha=weight_decay))
            p.sub_(buffer, alpha=rate)

    return update


def scaled_velocity_by_hand(parameters, momentum, weight_decay):
    velocities = [torch.zeros_like(p) for p in parameters]

    def update(gradients, rate):
        for p, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
            velocity.mul_(momentum).add_(gradient.add(p, alpha=weight_decay), alpha=rate)
            p.sub_(velocity)

    return update


def update_of_torch(kind, parameters, weight_decay):
    optimizer = kind(parameters, lr=1.0, weight_decay=weight_decay)

    def update(gradients, rate):
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return update


def train_by_hand(optimizee, train, update_rule, rates, kl_weight, batch_size=8):
    """Train plainly: no layer groups, no windows, whole epochs of shuffled images."""
    parameters = [p for p in optimizee.parameters() if p.requires_grad]
    update = update_rule(parameters)
    images = (train.images.float() - train.mean) / train.std
    with torch.no_grad():
        teacher = torch.log_softmax(optimizee(images)[1], dim=1)
    optimizee.initialise_head(torch_generator(5, "head"))
    size = len(train)
    order = torch.cat([
        torch.randperm(size, generator=torch_generator(6, "data-order", epoch))
        for epoch in range(len(rates) * batch_size // size + 1)
    ])  # fmt: skip
    for step, rate in enumerate(rates):
        index = order[step * batch_size : (step + 1) * batch_size]
        logits, old_logits = optimizee(images[index])
        loss = F.cross_entropy(logits, train.labels[index])
        if kl_weight:
            new = F.log_softmax(old_logits, dim=1)
            kl = F.kl_div(new, teacher[index], log_target=True, reduction="batchmean")
            loss = loss + kl_weight * kl
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            update(gradients, rate)
    return {k: v.clone() for k, v in optimizee.state_dict().items()}


UPDATE_RULES = {
    "sgd": lambda p: sgd_by_hand(p, 0.9, 0.01),
    "sgd-scaled-velocity": lambda p: scaled_velocity_by_hand(p, 0.9, 0.01),
    "adam": lambda p: update_of_torch(torch.optim.Adam, p, 0.01),
    "adamw": lambda p: update_of_torch(torch.optim.AdamW, p, 0.01),
}


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_at_multipliers_one_equals_plain_training(
    make_trainer, build_optimizee, tiny_splits, weights, identical, name, kl_weight
):
    settings = OPTIMIZERS[name] | {"weight_decay": 0.01}
    trainer = make_trainer({"kl": kl_weight}, **settings)
    trainer.reset(head_seed=5, data_seed=6)
    for window in (2, 3, 1):
        trainer.run(window, ONES)

    rates = [settings.get("base_lr", 0.1)] * 6
    plain = train_by_hand(
        build_optimizee(), tiny_splits["train"], UPDATE_RULES[name], rates, kl_weight
    )

    assert identical(weights(trainer), plain)


def test_run_applies_warm_up_and_decay_step_by_step(
    make_trainer, build_optimizee, tiny_splits, weights, identical
):
    trainer = make_trainer({}, lr_factor="warmup-poly", weight_decay=0.01)
    trainer.reset(head_seed=5, data_seed=6, base_lr_scale=10.0)
    trainer.run(3, ONES)
    trainer.run(3, ONES)

    rates = [0.1 * 10.0 * lr_factor("warmup-poly", step, 20) for step in range(6)]
    plain = train_by_hand(
        build_optimizee(), tiny_splits["train"], UPDATE_RULES["sgd"], rates, kl_weight=0
    )

    assert identical(weights(trainer), plain)


def test_run_moves_each_layer_group_by_its_multiplier(make_trainer, tiny_splits, weights):
    multipliers = {"backbone.0": 0.3, "backbone.1": 0.0, "head": 0.7}
    trainer = make_trainer({}, base_lr=0.2, weight_decay=0.05, momentum=0.9)
    before = weights(trainer)
    index = trainer_module.DataOrder(20, 8, 0, torch.device("cpu")).indices(0)
    train = tiny_splits["train"]
    loss = F.cross_entropy(trainer.optimizee(train.batch(index))[0], train.labels[index])
    loss.backward()
    gradients = {
        n: p.grad.clone() for n, p in trainer.optimizee.named_parameters() if p.grad is not None
    }

    trainer.run(1, tuple(multipliers.values()))

    after = weights(trainer)
    for name, gradient in gradients.items():
        multiplier = next(m for prefix, m in multipliers.items() if name.startswith(prefix))
        expected = before[name] - 0.2 * multiplier * (gradient + 0.05 * before[name])
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7)


def test_run_leaves_a_group_at_multiplier_zero_unmoved(make_trainer, weights, optimizer_settings):
    trainer = make_trainer(**optimizer_settings)
    before = weights(trainer)

    report = trainer.run(5, (0.0, 1.0, 0.0))

    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"backbone.1.weight", "backbone.1.bias"}
    assert report.drifts[0] == report.drifts[2] == 0.0
    assert report.update_ratios[0] == report.update_ratios[2] == 0.0
    assert min(report.grad_norms) > 0.0
    assert report.drifts[1] > 0.0


def test_run_stops_a_moving_group_at_once_in_the_pytorch_form_only(make_trainer):
    reports = {}
    for form in ("pytorch", "scaled-velocity"):
        trainer = make_trainer(momentum_form=form)
        trainer.run(3, ONES)
        reports[form] = trainer.run(1, (1.0, 1.0, 0.0))

    assert reports["pytorch"].update_ratios[2] == 0.0
    assert reports["scaled-velocity"].update_ratios[2] > 0.0


def test_run_gives_the_same_weights_however_it_is_cut_into_windows(
    make_trainer, weights, identical, optimizer_settings
):
    whole, parts = make_trainer(**optimizer_settings), make_trainer(**optimizer_settings)

    whole.run(6, (0.1, 1.0, 0.3))
    for window in (1, 3, 2):
        parts.run(window, (0.1, 1.0, 0.3))

    assert identical(weights(whole), weights(parts))
    assert whole.inner_step == parts.inner_step == 6


def test_run_averages_over_the_window(make_trainer):
    whole, parts = make_trainer(), make_trainer()

    report = whole.run(3, ONES)
    single = [parts.run(1, ONES) for _ in range(3)]

    for name in ("ce", "kl", "objective", "head_mean", "head_std"):
        mean = np.mean([getattr(one, name) for one in single])
        assert getattr(report, name) == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert report.drifts == single[-1].drifts
    assert report.grad_norms == single[-1].grad_norms
    assert report.objective == pytest.approx(report.ce + 0.1 * report.kl, rel=1e-6)
    head = parts.optimizee.head_weight()
    assert single[-1].head_mean == pytest.approx(head.mean().item(), abs=1e-7)
    assert single[-1].head_std == pytest.approx(head.std(correction=1).item(), rel=1e-6)


def test_run_compares_with_the_teacher_on_the_same_images(
    make_trainer, build_optimizee, tiny_splits
):
    trainer = make_trainer()
    trainer.run(6, ONES)
    index = trainer_module.DataOrder(20, 8, 0, torch.device("cpu")).indices(6)
    batch = tiny_splits["train"].batch(index)
    with torch.no_grad():
        old = build_optimizee()(batch)[1].double().log_softmax(dim=1)
        new = trainer.optimizee(batch)[1].double().log_softmax(dim=1)
    expected = (old.exp() * (old - new)).sum().item() / 8

    assert trainer.run(1, ONES).kl == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_run_with_guidance_stays_nearer_to_the_teacher(make_trainer):
    free, held = make_trainer({"kl": 0.0}, base_lr=0.3), make_trainer({"kl": 1.0}, base_lr=0.3)
    for trainer in (free, held):
        trainer.run(8, ONES)

    assert held.run(2, ONES).kl < 0.5 * free.run(2, ONES).kl


def test_run_never_changes_batchnorm_statistics_nor_the_old_head(make_trainer, weights):
    trainer = make_trainer()
    before = weights(trainer)
    trainer.run(5, ONES)

    after = weights(trainer)
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {
        "backbone.1.running_mean",
        "backbone.1.running_var",
        "backbone.1.num_batches_tracked",
        "old_head.weight",
        "old_head.bias",
    }
    assert not any(module.training for module in trainer.optimizee.modules())


@pytest.mark.parametrize("multiplier", [-0.5, math.nan, math.inf])
def test_run_refuses_a_multiplier_and_moves_nothing(make_trainer, weights, identical, multiplier):
    trainer = make_trainer()
    before = weights(trainer)

    with pytest.raises(ValueError, match=r"multipliers must be finite and >= 0, got"):
        trainer.run(2, (1.0, 1.0, multiplier))

    assert identical(weights(trainer), before)
    assert trainer.inner_step == 0


@pytest.mark.parametrize("count", [0, 2, 4])
def test_run_refuses_a_wrong_number_of_multipliers_and_moves_nothing(
    make_trainer, weights, identical, count
):
    trainer = make_trainer()
    before = weights(trainer)

    with pytest.raises(ValueError, match=rf"must be 3, one per layer group .*, got {count}"):
        trainer.run(2, (1.0,) * count)

    assert identical(weights(trainer), before)
    assert trainer.inner_step == 0


@pytest.mark.parametrize("base_lr_scale", [0.5, 1.0])
def test_reset_scales_the_base_rate(make_trainer, weights, identical, base_lr_scale):
    scaled, plain = make_trainer(base_lr=0.2), make_trainer(base_lr=0.2 * base_lr_scale)
    scaled.reset(0, 0, base_lr_scale)

    assert scaled.run(3, ONES) == plain.run(3, ONES)
    assert identical(weights(scaled), weights(plain))


def test_reset_restores_exactly(make_trainer, weights, identical, optimizer_settings):
    used, fresh = make_trainer(**optimizer_settings), make_trainer(**optimizer_settings)
    used.reset(head_seed=8, data_seed=9, base_lr_scale=3.0)
    used.run(4, ONES)
    used.evaluate("test")
    for trainer in (used, fresh):
        trainer.reset(head_seed=1, data_seed=2)

    assert identical(weights(used), weights(fresh))
    assert used.initial_report(2) == fresh.initial_report(2)
    assert used.run(4, ONES) == fresh.run(4, ONES)
    assert identical(weights(used), weights(fresh))


def test_reset_restores_exactly_after_divergence(make_trainer, weights, identical):
    used, fresh = make_trainer(), make_trainer()
    used.reset(0, 0, base_lr_scale=1e30)
    assert used.run(4, ONES).diverged
    for trainer in (used, fresh):
        trainer.reset(head_seed=1, data_seed=2)

    assert used.run(4, ONES) == fresh.run(4, ONES)
    assert identical(weights(used), weights(fresh))


def test_reset_draws_the_head_from_its_seed_and_the_images_from_theirs(make_trainer):
    trainer = make_trainer()

    def first(head_seed, data_seed):
        trainer.reset(head_seed, data_seed)
        return trainer.optimizee.head_weight().clone(), trainer.run(1, ONES).ce

    head, ce = first(1, 1)
    assert torch.equal(first(1, 2)[0], head)
    assert first(1, 2)[1] != ce
    assert not torch.equal(first(2, 1)[0], head)


def test_snapshot_and_restore_replay_bit_for_bit(
    make_trainer, weights, identical, optimizer_settings
):
    trainer = make_trainer(**optimizer_settings, lr_factor="warmup-poly")
    trainer.reset(1, 2, base_lr_scale=3.0)
    trainer.run(3, (1.0, 0.3, 1.0))
    snapshot = trainer.snapshot()
    expected = [trainer.run(2, ONES), trainer.run(4, (0.0, 1.0, 0.1))]
    end = weights(trainer)

    other = make_trainer(**optimizer_settings, lr_factor="warmup-poly")
    for replaying in (trainer, trainer, other):
        replaying.restore(snapshot)
        assert replaying.inner_step == 3
        assert [replaying.run(2, ONES), replaying.run(4, (0.0, 1.0, 0.1))] == expected
        assert identical(weights(replaying), end)


def test_restore_recovers_from_divergence(make_trainer, weights, identical, optimizer_settings):
    trainer = make_trainer(**optimizer_settings)
    trainer.run(2, ONES)
    snapshot = trainer.snapshot()
    expected, end = trainer.run(2, ONES), weights(trainer)
    trainer.restore(snapshot)
    assert trainer.run(4, (1e36,) * 3).diverged

    trainer.restore(snapshot)

    assert trainer.run(2, ONES) == expected
    assert identical(weights(trainer), end)


def test_initial_report_takes_no_step(make_trainer, weights, identical):
    trainer = make_trainer()
    before = weights(trainer)

    report = trainer.initial_report(2)

    assert identical(weights(trainer), before)
    assert trainer.inner_step == 0
    assert report.grad_norms == report.drifts == report.update_ratios == (0.0,) * 3
    assert not report.diverged


def test_initial_report_looks_at_the_first_batches(make_trainer, tiny_splits):
    trainer = make_trainer()
    order = trainer_module.DataOrder(20, 8, 0, torch.device("cpu"))
    index = torch.cat([order.indices(0), order.indices(1)])
    train = tiny_splits["train"]
    with torch.no_grad():
        logits = trainer.optimizee(train.batch(index))[0]
    expected = F.cross_entropy(logits, train.labels[index]).item()

    report = trainer.initial_report(2)

    assert report.ce == pytest.approx(expected, rel=1e-6)
    head = trainer.optimizee.head_weight()
    assert report.head_mean == pytest.approx(head.mean().item())
    assert report.head_std == pytest.approx(head.std().item())


def test_guidance_is_zero_before_the_first_inner_step(make_trainer):
    trainer = make_trainer()

    report = trainer.initial_report(3)

    assert report.kl == pytest.approx(0.0, abs=1e-6)
    assert report.objective == pytest.approx(report.ce, rel=1e-6)
    assert trainer.run(1, ONES).kl == pytest.approx(0.0, abs=1e-6)
    assert trainer.run(2, ONES).kl > 1e-5
