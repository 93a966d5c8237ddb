import json

import pytest
import torch

from asg_env.tasks import digits
from asg_env.tasks.digit_images import load_images
from asg_env.tasks.digits import LAYER_GROUPS, load_task, teacher_metadata, train_teacher


def test_layer_groups_run_from_input_to_head(digits_trainer):
    assert digits_trainer.layer_groups == ("conv1", "conv2", "conv3", "conv4", "head")
    # Per block a convolution and BatchNorm's two affine vectors; weight and bias of the head.
    groups = digits_trainer._optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [3, 3, 3, 3, 2]
    assert [group["name"] for group in groups] == list(LAYER_GROUPS)


def test_teacher_knows_the_old_digits(digits_trainer):
    result = digits_trainer.evaluate("old_task")

    assert result.accuracy == pytest.approx(
        float(teacher_metadata()["old_task_accuracy"]), abs=0.01
    )
    assert result.accuracy > 0.95
    assert digits_trainer.agreement("old_task") == 1.0


def test_teacher_file_says_where_it_comes_from():
    metadata = teacher_metadata()

    assert metadata["command"] == "python -m asg_env.tasks.digits"
    assert len(metadata["data_digest"]) == 64
    assert json.loads(metadata["settings"])["image_size"] == 16


def test_guidance_is_zero_before_the_first_inner_step(digits_trainer):
    assert digits_trainer.initial_report(4).kl == pytest.approx(0.0, abs=1e-6)


def test_training_moves_affine_parameters_but_no_batchnorm_statistics(digits_trainer, weights):
    before = weights(digits_trainer)
    digits_trainer.run(2, (1.0,) * 5)
    after = weights(digits_trainer)

    kept = {name for name in before if torch.equal(before[name], after[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = {name for name in before if name.endswith(statistics)}
    assert len(expected) == 12
    assert kept == expected | {"old_head.weight", "old_head.bias"}


def test_fresh_head_starts_near_chance(digits_trainer):
    assert digits_trainer.evaluate("test").accuracy < 0.5
    assert len(digits_trainer.evaluate("test").correct) == 1500


def test_load_task_gives_an_independent_network_each_time():
    first, second = load_task(), load_task()

    assert first.digest == second.digest
    first.optimizee.head_weight().data.zero_()
    assert second.optimizee.head_weight().abs().max() > 0


def test_train_teacher_repeats_and_leaves_the_global_generator(monkeypatch):
    monkeypatch.setattr("asg_env.tasks.digits.TEACHER_STEPS", 3)
    images, before = load_images(), torch.get_rng_state()

    (first, accuracy), (second, same) = (train_teacher(images, (2, 2, 2, 4)) for _ in range(2))

    assert accuracy == same
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def quick_teachers(tmp_path, monkeypatch):
    """An empty cache of teachers that are trained for three steps; returns how often they were."""
    trained = []
    train = digits.train_teacher

    def count(arrays, widths):
        trained.append(widths)
        return train(arrays, widths)

    images = load_images()
    monkeypatch.setattr(digits, "load_images", lambda *arguments: images)
    monkeypatch.setattr(digits, "TEACHER_STEPS", 3)
    monkeypatch.setattr(digits, "train_teacher", count)
    monkeypatch.setenv("ASG_CACHE", str(tmp_path / "not-there-yet"))
    return trained


def test_a_teacher_of_other_digits_is_trained_once_and_kept(quick_teachers):
    first, again = (digits.cached_teacher((0, 1, 2, 3, 4), 0.5) for _ in range(2))

    assert quick_teachers == [(4, 8, 16, 32)]
    assert all(torch.equal(first[name], again[name]) for name in first)
    digits.cached_teacher((0, 1, 2, 3, 4), 1.0)
    assert len(quick_teachers) == 2


def test_a_damaged_teacher_is_trained_again(quick_teachers, tmp_path):
    first = digits.cached_teacher((0, 1, 2, 3, 4), 0.5)
    (path,) = (tmp_path / "not-there-yet").iterdir()
    path.write_bytes(b"torn")

    again = digits.cached_teacher((0, 1, 2, 3, 4), 0.5)

    assert len(quick_teachers) == 2
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_teacher_is_returned_where_nothing_can_be_kept(quick_teachers, tmp_path):
    (tmp_path / "not-there-yet").write_text("a file in the place of the folder")

    assert "0.0.0.weight" in digits.cached_teacher((0, 1, 2, 3, 4), 0.5)


def test_width_scales_every_block_and_keeps_the_layer_groups(quick_teachers):
    task = load_task(width=2.0)

    convolutions = [m for m in task.optimizee.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16, 32, 64, 128]
    assert task.layer_groups == LAYER_GROUPS
    assert task.reference_digest is None
