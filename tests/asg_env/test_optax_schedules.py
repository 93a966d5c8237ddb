import numpy as np
import pytest
import torch


def test_optax_is_refused_another_form_of_momentum(make_schedule):
    pytest.importorskip("jax")
    with pytest.raises(ValueError, match="momentum_form 'scaled-velocity', which optax does not"):
        make_schedule(momentum_form="scaled-velocity").to_optax(8)


def test_optax_trains_as_torch_does(make_schedule, make_network):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    learned, model = make_schedule(lr_factor="warmup-poly", inner_steps=4), make_network()
    optimizer = torch.optim.SGD(learned.param_groups(model, base_lr=0.01))
    scheduler = learned.to_torch(optimizer, 8)
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    labels = {name: "body" if name.startswith("0") else "head" for name in start}
    rates = learned.to_optax(8, base_lr=0.01)
    assert list(rates) == ["body", "head"]
    transform = optax.multi_transform(
        {name: optax.sgd(rate, momentum=0.0) for name, rate in rates.items()}, labels
    )
    params, state = start, transform.init(start)
    for step in range(10):  # two beyond the end
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
        optimizer.step()
        scheduler.step()
        updates, state = jax.jit(transform.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=1e-4, atol=1e-6)
    for base_lr in (0, 1e300, True, "0.1"):
        with pytest.raises(ValueError, match="`base_lr` must be a finite number > 0, at most 1e"):
            learned.to_optax(8, base_lr=base_lr)
