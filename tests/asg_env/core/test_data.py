import pytest
import torch

from asg_env.core.data import DataOrder, Split

CPU = torch.device("cpu")


def take(order, count):
    """Indices of the first `count` images that training sees."""
    steps, size = [], 0
    while size < count:
        steps.append(order.indices(len(steps)))
        size += len(steps[-1])
    return torch.cat(steps)[:count]


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (3, 8), (7, 7), (5, 1)])
def test_data_order_visits_every_image_once_an_epoch(size, batch_size):
    epochs = take(DataOrder(size, batch_size, 0, CPU), 4 * size).split(size)

    assert all(epoch.sort().values.tolist() == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


def test_data_order_gives_full_batches_across_epochs():
    order = DataOrder(10, 4, 0, CPU)

    assert [len(order.indices(step)) for step in range(6)] == [4] * 6


def test_data_order_depends_on_seed_and_step_alone():
    forward = DataOrder(10, 4, 3, CPU)
    expected = [forward.indices(step) for step in range(20)]
    backward = DataOrder(10, 4, 3, CPU)

    for step in reversed(range(20)):
        torch.rand(3)  # the global generator plays no part
        assert torch.equal(backward.indices(step), expected[step])
    assert not torch.equal(take(DataOrder(10, 4, 4, CPU), 20), torch.cat(expected)[:20])


def test_split_batch_normalises_pixels_and_leaves_them_as_they_are():
    images = torch.tensor([0, 33, 103, 255], dtype=torch.uint8).view(2, 1, 1, 2)
    split = Split(images.clone(), torch.tensor([0, 1]), mean=33.0, std=70.0)

    batch = split.batch(torch.tensor([1, 0]))

    torch.testing.assert_close(batch.flatten(), torch.tensor([1.0, (255 - 33) / 70, -33 / 70, 0.0]))
    assert batch.dtype == torch.float32
    assert torch.equal(split.images, images)


def test_split_head_is_balanced_whatever_the_order_of_labels():
    labels = torch.tensor([0] * 6 + [1] * 6 + [2] * 6)
    images = torch.arange(18, dtype=torch.uint8).view(18, 1, 1, 1)

    head = Split(images, labels, 0.0, 1.0).head(7)

    assert len(head) == 7
    assert head.labels.bincount().tolist() == [3, 2, 2]
    assert torch.equal(labels[head.images.flatten().long()], head.labels)
    assert len(head.images.unique()) == 7
