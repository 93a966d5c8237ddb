import math

import pytest
import torch
from torch import nn

from asg_env.core.data import Split
from asg_env.core.guidance import TERMS, Guidance, GuidanceError, Weighted
from asg_env.core.optimizee import Optimizee
from asg_env.core.trainer import Trainer, TrainerSettings

ALL = dict.fromkeys(TERMS, 0.1)


def asked(name, weight=1.0, cap=None, **options):
    return {name: Weighted(TERMS[name], weight, cap, options)}


@pytest.mark.parametrize("name", TERMS)
def test_every_term_but_the_heads_part_of_l2_sp_is_zero_before_training(make_trainer, name):
    trainer = make_trainer(asked(name, head_ratio=0.0) if name == "l2_sp" else asked(name))
    report = trainer.initial_report(2)

    value = report.kl if name == "kl" else report.guidance[name]
    assert value == pytest.approx(0.0, abs=1e-6)
    assert report.objective == pytest.approx(report.ce, abs=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_holds_the_backbone_nearer(make_trainer, name):
    free, held = make_trainer({name: 0.0}), make_trainer({name: 0.5})

    for _ in range(5):
        before, after = free.run(4, [1.0] * 3), held.run(4, [1.0] * 3)

    value = (lambda r: r.kl) if name == "kl" else (lambda r: r.guidance[name])
    assert 0 < value(after) < value(before)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_weight_zero_trains_the_same_bits_as_none(make_trainer, weights, name):
    without, observed = make_trainer({}), make_trainer({name: 0.0})
    without.run(5, [1.0] * 3)
    report = observed.run(5, [1.0] * 3)

    for left, right in zip(weights(without).values(), weights(observed).values(), strict=True):
        assert torch.equal(left, right)
    assert report.kl > 0
    assert all(value > 0 for value in report.guidance.values())


def test_terms_add_up_with_their_weights(make_trainer):
    trainer = make_trainer({"kl": 0.5, "weight_l2": 0.25})
    trainer.run(3, [1.0] * 3)
    report = trainer.initial_report(2)

    total = report.ce + 0.5 * report.kl + 0.25 * report.guidance["weight_l2"]
    assert report.objective == pytest.approx(total, rel=1e-6)
    assert tuple(report.guidance) == ("weight_l2",)


def test_a_cap_bounds_the_weighted_value_and_its_slope(make_trainer):
    trainer = make_trainer({})
    trainer.run(6, [1.0] * 3)
    kl = trainer.initial_report(1).kl
    trainer.guide(asked("kl", weight=100.0, cap=kl))

    report = trainer.initial_report(1)

    assert report.objective == pytest.approx(report.ce + kl, rel=1e-5)
    # As a constant: the gradient is that of weight cap / value, not of a constant term.
    trainer.inner_step = 0
    capped = trainer.run(1, [0.0] * 3).grad_norms
    trainer.guide({"kl": 1.0})
    trainer.inner_step = 0
    plain = trainer.run(1, [0.0] * 3).grad_norms
    assert capped == pytest.approx(plain, rel=1e-3)


def test_a_cap_above_the_weighted_value_changes_nothing(make_trainer, weights):
    plain, capped = make_trainer({"kl": 0.1}), make_trainer(asked("kl", 0.1, cap=1e6))
    plain.run(5, [1.0] * 3)
    capped.run(5, [1.0] * 3)

    for left, right in zip(weights(plain).values(), weights(capped).values(), strict=True):
        assert torch.equal(left, right)


def test_weight_l2_is_the_squared_distance_of_the_backbone_alone(make_trainer):
    trainer = make_trainer({"weight_l2": 0.0})
    start = [p.detach().clone() for p in trainer.optimizee.backbone.parameters()]
    trainer.run(4, [1.0] * 3)
    now = trainer.optimizee.backbone.parameters()
    by_hand = sum((p - s).square().sum().item() for p, s in zip(now, start, strict=True))

    assert trainer.initial_report(1).guidance["weight_l2"] == pytest.approx(by_hand, rel=1e-5)


def test_l2_sp_also_draws_the_head_to_zero(make_trainer):
    trainer = make_trainer(asked("l2_sp", 0.0, head_ratio=0.3))
    head = sum(p.square().sum().item() for p in trainer.optimizee.head.parameters())

    assert trainer.initial_report(1).guidance["l2_sp"] == pytest.approx(0.3 * head / 2, rel=1e-5)


def test_feature_l2_compares_the_asked_layer_with_the_teachers(make_trainer):
    trainer = make_trainer(asked("feature_l2", 0.0, layer="0"))
    convolution = trainer.optimizee.backbone[0]
    start = convolution.weight.detach().clone()
    trainer.run(4, [1.0] * 3)
    batch, _ = trainer._batch(4)
    with torch.no_grad():
        now = convolution(batch)
        before = nn.functional.conv2d(batch, start)
    by_hand = (now - before).square().flatten(1).sum(dim=1).mean().item()

    trainer.inner_step = 4
    report = trainer.run(1, [0.0] * 3)

    assert report.guidance["feature_l2"] == pytest.approx(by_hand, rel=1e-4)


def test_feature_l2_remembers_teacher_features_where_images_are_not_augmented(make_trainer):
    trainer = make_trainer({"feature_l2": 0.1})
    calls = []
    trainer._teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    trainer.run(1, [1.0] * 3)
    first = len(calls)
    trainer.run(3, [1.0] * 3)

    assert len(calls) == first > 0


def test_feature_l2_computes_features_that_are_too_large_to_remember(make_trainer, monkeypatch):
    remembered = make_trainer({"feature_l2": 0.1})
    monkeypatch.setattr("asg_env.core.teacher.REMEMBERED_BYTES", 0)
    computed = make_trainer({"feature_l2": 0.1})

    left, right = (t.run(5, [1.0] * 3).guidance["feature_l2"] for t in (remembered, computed))

    assert left == pytest.approx(right, rel=1e-5)


def test_feature_l2_sees_augmented_images_in_both_networks(make_trainer):
    trainer = make_trainer({"feature_l2": 0.1}, augmentation="flip-crop")

    assert trainer.initial_report(2).guidance["feature_l2"] == pytest.approx(0.0, abs=1e-6)


def linear_trainer(guidance):
    """A backbone of one linear layer, whose Fisher information is known."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(4, 2, bias=False)
        optimizee = Optimizee(nn.Sequential(nn.Flatten(), layer), nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():  # the old head passes features on
        optimizee.old_head.weight.copy_(torch.eye(2))
        optimizee.old_head.bias.zero_()
    images = torch.randint(0, 256, (8, 1, 2, 2), generator=generator, dtype=torch.uint8)
    images[:, :, 1, 1] = 128  # the mean: zero once normalised
    split = Split(images, torch.arange(8) % 2, 128.0, 64.0)
    settings = TrainerSettings(base_lr=0.1, total_steps=10, batch_size=8, weight_decay=0.0)
    patterns = {"layer": r"backbone\.", "head": r"head\."}
    trainer = Trainer(
        optimizee, patterns, {"train": split}, settings, guidance, torch.device("cpu")
    )
    return trainer, layer, split.batch(slice(None)).flatten(1)


def test_ewc_weighs_squared_moves_by_the_analytic_fisher_of_a_linear_model():
    trainer, layer, x = linear_trainer({"ewc": 0.0})
    start = layer.weight.detach().clone()
    p = (x @ start.T).softmax(dim=1)
    fisher = (p * (1 - p)).T @ x.square() / len(x)

    trainer.run(4, [1.0, 1.0])
    moved = layer.weight.detach() - start

    by_hand = (fisher * moved.square()).sum().item() / 2
    assert trainer.initial_report(1).guidance["ewc"] == pytest.approx(by_hand, rel=1e-4)


def test_synaptic_intelligence_gives_no_importance_to_weights_that_nothing_reads():
    trainer, layer, x = linear_trainer({"si": 0.0})
    omega = trainer._terms[TERMS["si"], "[]"]._scales[0].square()

    assert x[:, 3].abs().max() == 0  # the last input is always zero
    assert omega[:, 3].tolist() == [0.0, 0.0]
    assert (omega[:, :3].sum(dim=0) > 0).all()


def test_importances_leave_network_and_global_generator_as_they_were(make_trainer, weights):
    trainer = make_trainer({})
    before, state = weights(trainer), torch.random.get_rng_state()

    trainer.guide({"si": 0.1, "ewc": 0.1})

    assert all(torch.equal(before[name], now) for name, now in weights(trainer).items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_another_weight_does_not_build_a_term_again(make_trainer):
    trainer = make_trainer({"si": 0.1})
    first = trainer._terms[TERMS["si"], "[]"]
    trainer.guide({"si": 0.7})

    assert trainer._terms[TERMS["si"], "[]"] is first
    assert trainer.guidance.weighted["si"].weight == 0.7


def test_snapshots_replay_under_all_terms_together(make_trainer, identical):
    trainer = make_trainer(ALL)
    trainer.run(3, [1.0] * 3)
    snapshot = trainer.snapshot()
    first = trainer.run(3, [0.5] * 3)
    trainer.restore(snapshot)

    assert trainer.run(3, [0.5] * 3) == first


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        (asked("kl", temperature=0.0), "`temperature` of kl must be a finite number > 0, got 0.0"),
        (asked("l2_sp", head_ratio=math.nan), "`head_ratio` of l2_sp must be a finite number"),
        (
            asked("feature_l2", layer="layer9"),
            "`layer` of feature_l2 must be the dotted name of a module of the backbone, such as "
            "0, 1, 2, 3, got 'layer9'",
        ),
    ],
)
def test_terms_refuse_options_in_one_sentence(make_trainer, term, sentence):
    with pytest.raises(GuidanceError, match="must be") as caught:
        make_trainer(term)
    assert sentence in str(caught.value)


def test_a_cap_lets_a_value_below_zero_pass():
    # The KL of a network with itself is zero up to rounding, on either side.
    guidance = Guidance(asked("kl", weight=75.0, cap=9.0), {})
    value = torch.tensor(-1e-8, requires_grad=True)

    total = guidance.objective(torch.tensor(2.0), {"kl": value})
    total.backward()

    assert total.item() == pytest.approx(2.0)
    assert value.grad.item() == 75.0


def test_teacher_sees_an_augmented_batch_once(make_trainer):
    trainer = make_trainer({"feature_l2": 0.1}, augmentation="flip-crop")
    calls = []
    trainer._teacher.backbone.register_forward_hook(lambda *_: calls.append(1))
    trainer.run(4, [1.0] * 3)

    assert len(calls) == 4


class Broken:
    def __init__(self, pretrained, answer="vector"):
        if answer == "raise":
            raise KeyError("no such layer")
        self.answer = answer

    def __call__(self, step):
        return 1.0 if self.answer == "float" else torch.ones(2)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("raise", "'Broken' cannot be built: KeyError: 'no such layer'"),
        ("float", "'Broken' must return a tensor without axes, got 1.0"),
        ("vector", "'Broken' must return a tensor without axes, got tensor"),
    ],
)
def test_terms_that_do_not_work_are_refused_in_one_sentence(make_trainer, answer, sentence):
    with pytest.raises(GuidanceError) as caught:  # noqa: PT011
        make_trainer({"Broken": Weighted(Broken, 1.0, None, {"answer": answer})}).run(1, [1.0] * 3)
    assert sentence in str(caught.value)
