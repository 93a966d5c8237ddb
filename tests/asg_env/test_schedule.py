import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from asg_env.config import EnvSettings
from asg_env.core.data import DataOrder
from asg_env.core.optimizers import ScaledVelocitySGD, lr_factor
from asg_env.core.seeding import torch_generator
from asg_env.env import LayerwiseLREnv
from asg_env.instances import Instance
from asg_env.schedule import LearnedSchedule
from asg_env.tasks import load_task

TASK = "ASG/Digits-v0"
MULTIPLIERS = ((1.0, 0.1), (0.5, 0.2), (0.0, 0.4))


def schedule(**changes) -> LearnedSchedule:
    """Two groups and three knots for `network()`."""
    values = {
        "layer_groups": {"body": r"0\.", "head": r"2\."},
        "knots": (0.0, 0.25, 0.5),
        "multipliers": MULTIPLIERS,
        "spread": ((0.0, 0.1),) * 3,
        "base_lr": 0.3,
        "optimizer": "sgd",
        "momentum_form": "pytorch",
        "lr_factor": "constant",
        "episodes": 16,
        "task": TASK,
        "instances": "unknown-scale",
        "base_lr_scale": 1.0,
        "inner_steps": 150,
        "settings": {"horizon": 3, "reward": {"gain": 1.0}},
        "provenance": {"config_digest": "abc"},
    }
    return LearnedSchedule(**{**values, **changes})


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


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


# The file


def test_schedule_survives_its_file(tmp_path):
    original = schedule()
    original.save(tmp_path / "schedule.json")
    assert LearnedSchedule.load(tmp_path / "schedule.json") == original
    assert list(LearnedSchedule.load(str(tmp_path / "schedule.json")).layer_groups) == [
        "body",
        "head",
    ]


def test_schedule_file_is_plain_json_with_format_and_version(tmp_path):
    schedule().save(tmp_path / "schedule.json")
    assert [p.name for p in tmp_path.iterdir()] == ["schedule.json"]  # no temporary file
    record = json.loads((tmp_path / "schedule.json").read_text(encoding="utf-8"))
    assert (record["format"], record["version"]) == ("asg-env-schedule", 1)
    assert record["knots"] == [0.0, 0.25, 0.5]
    assert record["multipliers"] == [list(row) for row in MULTIPLIERS]


def test_schedule_keeps_every_bit_of_its_numbers(tmp_path):
    numbers = np.random.default_rng(0).random((3, 2))
    original = schedule(multipliers=tuple(map(tuple, numbers.tolist())), base_lr=0.1 + 0.2)
    original.save(tmp_path / "schedule.json")
    loaded = LearnedSchedule.load(tmp_path / "schedule.json")
    np.testing.assert_array_equal(loaded.multipliers, numbers)
    assert loaded.base_lr == 0.1 + 0.2


@pytest.fixture
def write(tmp_path):
    """Save a schedule with some entries of its record changed; return the path."""

    def write_(**changes):
        path = tmp_path / "schedule.json"
        schedule().save(path)
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, value in changes.items():
            if value is ...:
                del record[name]
            else:
                record[name] = value
        path.write_text(json.dumps(record), encoding="utf-8")
        return path

    return write_


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "has schedule version 2, this asg-env reads 1; use the asg-env that"),
        ({"version": ...}, "has schedule version None"),
        ({"format": "else"}, "is not a schedule: its `format` must be 'asg-env-schedule'"),
        ({"format": ...}, "is not a schedule"),
        ({"knots": ...}, r"must have the keys .*; wrong are \['knots'\]"),
        ({"speed": 1}, r"must have the keys .*; wrong are \['speed'\]"),
        ({"multipliers": [[math.nan, 0.1]] * 3}, "`multipliers` must be finite and >= 0, got nan"),
        ({"multipliers": [[math.inf, 0.1]] * 3}, "`multipliers` must be finite and >= 0, got inf"),
        ({"multipliers": [[-0.1, 0.1]] * 3}, r"`multipliers` must be finite and >= 0, got -0\.1"),
        ({"spread": [[-1, 0.1]] * 3}, r"`spread` must be finite and >= 0, got -1\.0"),
        ({"multipliers": [[0.1, 0.1]] * 2}, "`multipliers` must be 3 knots x 2 groups"),
        ({"multipliers": [[0.1]] * 3}, "`multipliers` must be 3 knots x 2 groups"),
        ({"multipliers": [["fast", 0.1]] * 3}, "is damaged"),
        ({"multipliers": 3}, "is damaged"),
        ({"multipliers": None}, "is damaged"),
        ({"knots": [0.0, 0.5, 0.5]}, "`knots` must increase from 0 and stay below 1"),
        ({"knots": [0.0, 0.5, 0.25]}, "`knots` must increase from 0"),
        ({"knots": [0.1, 0.25, 0.5]}, "`knots` must increase from 0"),
        ({"knots": [0.0, 0.5, 1.0]}, "`knots` must increase from 0 and stay below 1"),
        ({"knots": [0.0, math.nan, 0.5]}, "`knots` must increase from 0"),
        ({"knots": []}, "`knots` must increase from 0"),
        ({"base_lr": 0}, "`base_lr` must be a finite number > 0, got 0"),
        ({"base_lr": math.inf}, "`base_lr` must be a finite number > 0, got inf"),
        ({"base_lr": "fast"}, "is damaged"),
        ({"lr_factor": "cosine"}, "`lr_factor` must be constant or warmup-poly, got 'cosine'"),
        ({"layer_groups": {}}, "`layer_groups` must name at least one group"),
        ({"layer_groups": ["body", "head"]}, "`layer_groups` must map names to patterns"),
        ({"layer_groups": {"body": 0, "head": 2}}, "`layer_groups` must map names to patterns"),
        ({"layer_groups": {"body": "(", "head": "2"}}, "`layer_groups` must map names to patterns"),
        ({"settings": [1]}, r"`settings` must be a mapping, got \[1\]"),
        ({"momentum_form": "nesterov"}, "`momentum_form` must be pytorch or scaled-velocity"),
    ],
)
def test_schedule_load_refuses_what_it_cannot_use(write, changes, message):
    path = write(**changes)
    with pytest.raises(ValueError, match=message) as caught:
        LearnedSchedule.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'"text"'])
def test_schedule_load_refuses_what_is_no_schedule(tmp_path, content):
    path = tmp_path / "schedule.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a schedule|is not a schedule"):
        LearnedSchedule.load(path)


def test_schedule_load_says_that_a_file_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read as a schedule"):
        LearnedSchedule.load(tmp_path / "nowhere.json")


def test_schedule_truncated_file_is_refused_at_any_length(tmp_path):
    path = tmp_path / "schedule.json"
    schedule().save(path)
    content = path.read_bytes()
    for length in range(0, len(content.rstrip()), 37):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot be read as a schedule"):
            LearnedSchedule.load(path)


# Reading it


def test_schedule_holds_each_knots_value_until_the_next():
    learned = schedule()
    for progress, row in (
        (0.0, 0),
        (0.2499, 0),
        (0.25, 1),
        (0.4999, 1),
        (0.5, 2),
        (0.99, 2),
        (1.0, 2),
    ):
        assert learned.at(progress) == MULTIPLIERS[row], progress


def test_param_groups_name_the_groups_and_set_both_rates():
    model = network()
    groups = schedule().param_groups(model, base_lr=0.05)
    assert [group["name"] for group in groups] == ["body", "head"]
    assert [(group["lr"], group["initial_lr"]) for group in groups] == [(0.05, 0.05)] * 2
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert groups[0]["params"][0] is model[0].weight


def test_param_groups_use_the_schedules_own_rate_when_none_is_given():
    assert {group["lr"] for group in schedule().param_groups(network())} == {0.3}


def test_param_groups_pass_frozen_parameters_over():
    model = network()
    model.append(nn.Linear(2, 2).requires_grad_(False))  # matches no group
    model[0].bias.requires_grad_(False)
    groups = schedule().param_groups(model)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_param_groups_refuse_a_trainable_parameter_without_a_group():
    model = network().append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"match no layer group .*3\.weight, 3\.bias"):
        schedule().param_groups(model)


def test_param_groups_refuse_a_parameter_of_several_groups():
    learned = schedule(layer_groups={"body": r"[02]\.", "head": r"2\."})
    with pytest.raises(ValueError, match=r"several layer groups: 2\.weight \(body, head\)"):
        learned.param_groups(network())


def test_param_groups_refuse_a_group_without_parameters():
    with pytest.raises(ValueError, match=r"layer groups \['head'\] match no trainable parameter"):
        schedule().param_groups(network()[:2])


@pytest.mark.parametrize("base_lr", [0.0, -0.1, math.nan, math.inf])
def test_param_groups_refuse_a_rate_that_is_none(base_lr):
    with pytest.raises(ValueError, match="`base_lr` must be a finite number > 0"):
        schedule().param_groups(network(), base_lr)


# Driving an optimizer


def test_schedule_lr_sets_the_rate_of_every_inner_step():
    model, learned = network(), schedule()
    optimizer = sgd(model, learned, base_lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a step in the wrong order
        rates = train_steps(model, optimizer, learned.to_torch(optimizer, total_steps=8), 8)
    expected = [[0.01 * m for m in learned.at(step / 8)] for step in range(8)]
    assert rates == expected


@pytest.mark.parametrize("total", [1, 2, 3, 7, 15, 49, 150, 1000])
def test_schedule_lr_starts_windows_where_the_environment_did(total):
    # Knots are rounded fractions; comparing step / total with them would slip by one step.
    windows = min(total, 15)
    starts = [total * i // windows for i in range(windows)]
    learned = schedule(
        knots=tuple(start / total for start in starts),
        multipliers=tuple((float(i), 1.0) for i in range(windows)),
        spread=((0.0, 0.0),) * windows,
    )
    optimizer = sgd(network(), learned, base_lr=1.0)
    scheduler = learned.to_torch(optimizer, total)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    changes = [i for i in range(total) if i == 0 or seen[i] != seen[i - 1]]
    assert changes == starts


def test_schedule_lr_multiplies_the_common_factor():
    learned = schedule(lr_factor="warmup-poly")
    model = network()
    optimizer = sgd(model, learned, base_lr=0.01)
    rates = train_steps(model, optimizer, learned.to_torch(optimizer, 300), 300)
    for step in (0, 50, 99, 100, 200, 299):
        factor = lr_factor("warmup-poly", step, 300)
        assert rates[step] == pytest.approx([0.01 * m * factor for m in learned.at(step / 300)])
    assert rates[0][0] == pytest.approx(0.01 * 0.01)


def test_schedule_lr_holds_the_last_window_beyond_the_end():
    learned, model = schedule(), network()
    optimizer = sgd(model, learned, base_lr=0.01)
    rates = train_steps(model, optimizer, learned.to_torch(optimizer, 4), 10)
    assert rates[4:] == [[0.0, 0.004]] * 6


def test_schedule_lr_state_is_plain_numbers():
    learned = schedule()
    model = network()
    optimizer = sgd(model, learned)
    scheduler = learned.to_torch(optimizer, 8)
    train_steps(model, optimizer, scheduler, 3)
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["last_epoch"], state["total_steps"]) == (3, 8)


@pytest.mark.parametrize(
    "optimizer_first", [False, True], ids=["scheduler-first", "optimizer-first"]
)
@pytest.mark.parametrize("at", [0, 1, 3, 4, 7])
def test_schedule_lr_resumes_midway_exactly(tmp_path, at, optimizer_first):
    learned = schedule()

    def build():
        model = network()
        optimizer = sgd(model, learned, base_lr=0.01)
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
    model = network()
    model.load_state_dict(stored["model"])
    optimizer = sgd(model, learned, base_lr=0.01)
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
def test_schedule_lr_refuses_a_length_that_is_none(total):
    learned = schedule()
    with pytest.raises(ValueError, match=r"`total_steps` must be an integer >= 1, got"):
        learned.to_torch(sgd(network(), learned), total)


def test_schedule_lr_refuses_groups_in_another_order():
    learned = schedule()
    groups = learned.param_groups(network())[::-1]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    with pytest.raises(ValueError, match=r"must be \['body', 'head'\], got \['head', 'body'\]"):
        learned.to_torch(optimizer, 8)


def test_schedule_lr_refuses_an_optimizer_without_its_groups():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got \[None\]; build it on schedule\.param_groups"):
        schedule().to_torch(optimizer, 8)


def test_schedule_lr_refuses_momentum_of_another_form():
    scaled = schedule(momentum_form="scaled-velocity")
    with pytest.raises(ValueError, match=r"momentum_form 'scaled-velocity', got SGD; use the"):
        scaled.to_torch(sgd(network(), scaled), 8)
    with pytest.raises(ValueError, match=r"momentum_form 'scaled-velocity', got Adam"):
        scaled.to_torch(torch.optim.Adam(scaled.param_groups(network())), 8)
    plain = schedule()
    velocity = ScaledVelocitySGD(plain.param_groups(network()))
    with pytest.raises(ValueError, match=r"momentum_form 'pytorch', got ScaledVelocitySGD"):
        plain.to_torch(velocity, 8)
    velocity = ScaledVelocitySGD(scaled.param_groups(network()))
    assert scaled.to_torch(velocity, 8).total_steps == 8


# The environment's training, in a plain loop


def replay(settings: EnvSettings, learned: LearnedSchedule, instance: Instance) -> nn.Module:
    """What a user writes: torch and the schedule; the data order and the head are theirs."""
    task = load_task(TASK)
    model, train = task.optimizee, task.splits["train"]
    images = (train.images.float() - train.mean) / train.std
    with torch.no_grad():  # the teacher, in the batches in which the environment asks it
        teacher = torch.cat([model(images[i : i + 512])[1] for i in range(0, len(images), 512)])
        teacher = torch.log_softmax(teacher, dim=1)
    model.initialise_head(torch_generator(instance.head_seed, "head"))
    total = sum(settings.windows())
    order = DataOrder(len(train), settings.batch_size, instance.data_seed, torch.device("cpu"))

    form = torch.optim.SGD if settings.momentum_form == "pytorch" else ScaledVelocitySGD
    optimizer = form(learned.param_groups(model), momentum=0.9, weight_decay=5e-4)
    scheduler = learned.to_torch(optimizer, total_steps=total)
    for step in range(total):
        index = order.indices(step)
        logits, old_logits = model(images[index])
        kl = F.kl_div(
            torch.log_softmax(old_logits, dim=1),
            teacher[index],
            log_target=True,
            reduction="batchmean",
        )
        loss = F.cross_entropy(logits, train.labels[index]) + 0.1 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


@pytest.mark.parametrize("factor", ["constant", "warmup-poly"])
@pytest.mark.parametrize("form", ["pytorch", "scaled-velocity"])
def test_schedule_replays_the_environments_training_bit_for_bit(form, factor):
    settings = EnvSettings(
        horizon=4, inner_steps=3, outer_valid_size=50, momentum_form=form, lr_factor=factor
    )
    instance = Instance(TASK, head_seed=1, data_seed=2)
    multipliers = np.random.default_rng(3).random((4, 5)).tolist()
    multipliers[1][0] = 0.0  # where the two forms of momentum part
    env = LayerwiseLREnv(TASK, settings)
    env.reset(options={"instance": instance})
    for row in multipliers:
        env.step_multipliers(row)
    learned = schedule(
        layer_groups=dict(env.trainer.patterns),
        knots=(0.0, 3 / 12, 6 / 12, 9 / 12),
        multipliers=tuple(map(tuple, multipliers)),
        spread=((0.0,) * 5,) * 4,
        base_lr=settings.base_lr,
        momentum_form=form,
        lr_factor=factor,
    )
    model = replay(settings, learned, instance)
    expected = env.trainer.optimizee.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # The control: other multipliers in the last window give other weights.
    last = tuple(2 * m for m in learned.multipliers[-1])
    other = replay(
        settings, replace(learned, multipliers=(*learned.multipliers[:-1], last)), instance
    )
    assert not torch.equal(other.head_weight(), model.head_weight())
