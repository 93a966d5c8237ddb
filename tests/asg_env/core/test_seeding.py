import numpy as np
import torch

from asg_env.core.seeding import derive_seed, numpy_generator, torch_generator


def test_derive_seed_is_the_same_on_every_machine():
    assert derive_seed(0) == 3456079177858693020
    assert derive_seed(0, "head") == 6551998802971462994
    assert derive_seed(7, "rollout", 3, 1) == 400775815199329514


def test_derive_seed_differs_between_seeds_and_names():
    seeds = {derive_seed(seed, name, i) for seed in range(5) for name in "ab" for i in range(5)}

    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat_their_draws():
    first = torch.rand(3, generator=torch_generator(1, "x"))
    second = torch.rand(3, generator=torch_generator(1, "x"))

    assert torch.equal(first, second)
    np.testing.assert_array_equal(
        numpy_generator(1, "x").random(3), numpy_generator(1, "x").random(3)
    )
