import torch

from asg_env.core.seeding import torch_generator


def test_optimizee_stays_in_eval_mode_with_a_frozen_old_head(build_optimizee):
    optimizee = build_optimizee()

    assert not any(module.training for module in optimizee.modules())
    assert not any(p.requires_grad for p in optimizee.old_head.parameters())
    assert all(p.requires_grad for p in optimizee.backbone.parameters())


def test_optimizee_forward_feeds_both_heads_with_the_same_features(build_optimizee):
    optimizee = build_optimizee()
    images = torch.rand(2, 1, 4, 4, generator=torch_generator(0))

    logits, old_logits = optimizee(images)

    features = optimizee.backbone(images)
    assert torch.equal(logits, optimizee.head(features))
    assert torch.equal(old_logits, optimizee.old_head(features))


def test_head_weight_is_the_one_of_the_last_linear_layer(build_optimizee):
    optimizee = build_optimizee()

    assert optimizee.head_weight() is optimizee.head[2].weight


def test_initialise_head_draws_within_the_bounds_of_each_layer(build_optimizee):
    optimizee = build_optimizee()

    optimizee.initialise_head(torch_generator(0, "head"))

    for layer in (optimizee.head[0], optimizee.head[2]):
        bound = layer.in_features**-0.5
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound
        assert layer.weight.abs().max() > 0.7 * bound


def test_initialise_head_depends_on_the_generator_alone(build_optimizee):
    twins = [build_optimizee(), build_optimizee(), build_optimizee()]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        twin.initialise_head(torch_generator(seed, "head"))

    first, same, other = (twin.head_weight() for twin in twins)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(twins[0].backbone[0].weight, twins[2].backbone[0].weight)
