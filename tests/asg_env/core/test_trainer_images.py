"""The trainer on host images, with augmentation and in bfloat16; what is left of the old task."""

import math
from dataclasses import replace

import pytest
import torch

from asg_env.core.augmentation import Augmentation
from asg_env.core.data import DataOrder, HostImages
from asg_env.core.numerics import kernels
from asg_env.core.seeding import derive_seed
from asg_env.core.teacher import Teacher

ONES = (1.0, 1.0, 1.0)
CPU = torch.device("cpu")
AUGMENTATIONS = ("flip-crop", "randaugment")


def on_host(split):
    """The same split, its images read from a NumPy array batch by batch."""
    pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
    rows = torch.arange(len(split)).numpy()
    return replace(split, images=HostImages(lambda r: pixels[r], rows, (1, 4, 4), cheap=True))


@pytest.fixture
def host_splits(tiny_splits):
    return {name: on_host(split) for name, split in tiny_splits.items()}


@pytest.fixture(params=["resident", "host"])
def splits(request, tiny_splits, host_splits):
    return tiny_splits if request.param == "resident" else host_splits


def train(trainer, seeds=(1, 2), windows=(2, 3, 1)):
    """Everything that a training reports, from the first observation to the last accuracy."""
    trainer.reset(*seeds)
    reports = [trainer.initial_report(2)]
    for window in windows:
        reports.append(trainer.run(window, (0.3, 1.0, 1.0)))
        reports.append(trainer.evaluate("outer_valid").loss)
    return reports


# Host images


@pytest.mark.parametrize("augmentation", ["none", *AUGMENTATIONS])
def test_training_on_host_images_equals_training_on_resident_ones(
    make_trainer, host_splits, weights, identical, augmentation
):
    resident = make_trainer(augmentation=augmentation)
    host = make_trainer(splits=host_splits, augmentation=augmentation)

    assert train(host) == train(resident)
    assert identical(weights(host), weights(resident))
    assert isinstance(host.splits["train"].images, HostImages)
    assert host.agreement("old_task") == resident.agreement("old_task")
    assert host.retention() == resident.retention()


def test_training_on_host_images_reads_each_batch_once(make_trainer, host_splits):
    trainer = make_trainer(splits=host_splits, augmentation="flip-crop")
    trainer.reset(1, 2)
    read, images = [], trainer.splits["train"].images
    original = images._read
    images._read = lambda rows: read.append(rows.tolist()) or original(rows)

    trainer.run(3, ONES)
    trainer.run(2, ONES)

    images._reader.submit(lambda: None).result()  # until the batch that is read ahead is there
    order = DataOrder(20, 8, 2, CPU)
    assert read == [order.indices(step).tolist() for step in range(6)]


# Augmentation


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_augmented_training_compares_with_the_teacher_on_the_same_pixels(
    make_trainer, build_optimizee, tiny_splits, splits, augmentation
):
    trainer = make_trainer(splits=splits, augmentation=augmentation)
    trainer.reset(head_seed=1, data_seed=2)
    trainer.run(6, ONES)
    train = tiny_splits["train"]
    index = DataOrder(20, 8, 2, CPU).indices(6)
    seed = derive_seed(2, "augmentation", 6)
    augmented = Augmentation(augmentation, (4, 4))(train.images[index], seed)

    def kl(pixels):
        with torch.no_grad():
            old = build_optimizee()(pixels)[1].double().log_softmax(dim=1)
            new = trainer.optimizee(train.normalise(augmented))[1].double().log_softmax(dim=1)
        return (old.exp() * (old - new)).sum().item() / 8

    expected = kl(train.normalise(augmented))
    others = kl(train.batch(index))
    report = trainer.run(1, ONES)
    assert report.kl == pytest.approx(expected, rel=1e-4)
    assert report.kl != pytest.approx(others, rel=1e-2)  # the images as they were


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_guidance_is_zero_before_the_first_augmented_step(make_trainer, splits, augmentation):
    trainer = make_trainer(splits=splits, augmentation=augmentation)

    assert trainer.initial_report(3).kl == pytest.approx(0.0, abs=1e-6)
    assert trainer.run(1, ONES).kl == pytest.approx(0.0, abs=1e-6)
    assert trainer.run(2, ONES).kl > 1e-5


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_augmented_training_repeats_with_its_seed_alone(
    make_trainer, weights, identical, augmentation
):
    first, second = (make_trainer(augmentation=augmentation) for _ in range(2))

    reports, end = train(first), weights(first)
    torch.rand(3)
    assert train(second) == reports
    assert identical(weights(second), end)
    assert train(second, seeds=(1, 3)) != reports
    assert train(make_trainer(), seeds=(1, 2)) != reports


def test_augmented_images_of_a_step_differ_from_those_of_the_next_epoch(make_trainer, tiny_splits):
    small = tiny_splits | {"train": tiny_splits["train"].head(1)}
    trainer = make_trainer(splits=small, batch_size=1, augmentation="flip-crop")

    pixels = [trainer._batch(step)[0] for step in range(4)]  # the same image four times

    assert len({image.numpy().tobytes() for image in pixels}) > 1
    assert torch.equal(trainer._batch(2)[0], pixels[2])


@pytest.mark.parametrize("augmentation", ["none", *AUGMENTATIONS])
def test_snapshot_and_restore_replay_bit_for_bit(
    make_trainer, splits, weights, identical, augmentation
):
    trainer = make_trainer(splits=splits, augmentation=augmentation)
    trainer.reset(1, 2)
    trainer.run(3, ONES)
    snapshot = trainer.snapshot()
    expected, end = [trainer.run(2, ONES), trainer.run(1, ONES)], weights(trainer)

    other = make_trainer(splits=splits, augmentation=augmentation)
    other.reset(8, 9)
    other.run(1, ONES)  # reads a batch ahead that is not the one to come
    for replaying in (trainer, other):
        replaying.restore(snapshot)
        assert [replaying.run(2, ONES), replaying.run(1, ONES)] == expected
        assert identical(weights(replaying), end)


# Precision


def test_bfloat16_trains_near_float32_but_not_alike(make_trainer):
    low, full = make_trainer(precision="bfloat16"), make_trainer()

    assert low.initial_report(2).kl == pytest.approx(0.0, abs=1e-3)
    reports = [trainer.run(4, ONES) for trainer in (low, full)]

    assert not reports[0].diverged
    numbers = (reports[0].ce, reports[0].kl, *reports[0].grad_norms, *reports[0].drifts)
    assert all(map(math.isfinite, numbers))
    assert reports[0].ce != reports[1].ce
    assert reports[0].ce == pytest.approx(reports[1].ce, rel=0.05)
    assert low.evaluate("test").loss == pytest.approx(full.evaluate("test").loss, rel=0.05)


def test_bfloat16_keeps_weights_and_scores_in_float32(make_trainer):
    trainer = make_trainer(precision="bfloat16")
    trainer.run(2, ONES)

    kept = {t.dtype for t in trainer.optimizee.state_dict().values() if t.is_floating_point()}
    assert kept == {torch.float32}
    batch = trainer.splits["train"].batch(slice(4))
    assert trainer._teacher.log_probs(batch).dtype == torch.float32
    assert trainer._through(trainer.optimizee.head)(batch).dtype == torch.float32


@pytest.mark.parametrize("augmentation", ["none", "flip-crop"])
def test_bfloat16_training_repeats(make_trainer, weights, identical, augmentation):
    first, second = (
        make_trainer(precision="bfloat16", augmentation=augmentation) for _ in range(2)
    )

    assert train(first) == train(second)
    assert identical(weights(first), weights(second))


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_change_nothing_on_a_cpu(deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    with kernels(deterministic, CPU):
        assert torch.are_deterministic_algorithms_enabled() is before
    assert torch.are_deterministic_algorithms_enabled() is before


# What is left of the old task


def test_retention_is_the_old_heads_accuracy_where_there_are_labels(make_trainer, tiny_splits):
    trainer = make_trainer({}, base_lr=1.0)
    trainer.run(10, ONES)
    old = tiny_splits["old_task"]
    with torch.no_grad():
        right = trainer.optimizee(old.batch(slice(None)))[1].argmax(dim=1) == old.labels

    assert trainer.retention() == pytest.approx(right.float().mean().item())
    assert trainer.retention() != trainer.agreement("old_task")


def test_retention_is_agreement_where_there_are_no_labels(make_trainer, tiny_splits):
    splits = tiny_splits | {"old_task": replace(tiny_splits["old_task"], labels=None)}
    trainer = make_trainer({}, splits, base_lr=1.0)
    assert trainer.retention() == 1.0

    trainer.run(10, ONES)

    labelled = make_trainer({}, base_lr=1.0)
    labelled.run(10, ONES)
    assert trainer.retention() == labelled.agreement("old_task") < 1.0
    with pytest.raises(ValueError, match=r"the images of this split have no labels"):
        trainer.evaluate("old_task")


def test_retention_cannot_be_measured_where_there_are_no_images(make_trainer, tiny_splits):
    without = {name: split for name, split in tiny_splits.items() if name != "old_task"}

    assert make_trainer(splits=without).retention() is None


# The teacher


def test_teacher_restores_the_whole_backbone_exactly(build_optimizee, weights):
    optimizee, untouched = build_optimizee(), build_optimizee()
    teacher = Teacher(optimizee, "float32", CPU)
    with torch.no_grad():
        for tensor in optimizee.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 7))

    teacher.restore(optimizee)

    for name, tensor in optimizee.state_dict().items():
        if name.startswith("backbone"):
            assert torch.equal(tensor, untouched.state_dict()[name]), name
    assert (optimizee.head_weight() == 7).all()  # the head is the instance's to draw


def test_teacher_does_not_follow_the_network_that_is_trained(make_trainer, tiny_splits):
    trainer = make_trainer()
    batch = tiny_splits["train"].batch(slice(None))
    before = trainer._teacher.log_probs(batch)

    trainer.run(3, ONES)

    assert torch.equal(trainer._teacher.log_probs(batch), before)
    assert torch.allclose(before.exp().sum(dim=1), torch.ones(20))
    assert not before.requires_grad


def test_teacher_looks_at_a_split_once(build_optimizee, tiny_splits):
    teacher = Teacher(build_optimizee(), "float32", CPU)
    first = teacher.of_split("train", tiny_splits["train"])

    assert teacher.of_split("train", tiny_splits["train"]) is first
    torch.testing.assert_close(first, teacher.log_probs(tiny_splits["train"].batch(slice(None))))
    assert not torch.equal(teacher.of_split("test", tiny_splits["test"]), first[:12])
