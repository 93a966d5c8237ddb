import numpy as np
import pytest
import torch

from asg_env.core import data
from asg_env.core.data import DataOrder, HostImages, Split, place, placement

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


# Images on the host


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (10, 5, 6, 3)).astype(np.uint8)


@pytest.fixture
def resident(pixels):
    """The same images as a tensor."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture
def make_host(pixels):
    """Return a function that makes host images; `log` gets the rows of every read."""

    def make(log=None, cheap=True):
        def read(rows):
            if log is not None:
                log.append(rows.tolist())
            return pixels[rows]

        return HostImages(read, np.arange(len(pixels)), (3, 5, 6), cheap=cheap)

    return make


INDEX = torch.tensor([7, 0, 7, 3])
OTHER = torch.tensor([7, 0, 3, 7])


@pytest.mark.parametrize("ahead", [None, INDEX, OTHER, torch.tensor([1])])
@pytest.mark.parametrize("index", [INDEX, slice(2, 9, 3), slice(None)], ids=str)
def test_host_images_are_those_of_a_resident_tensor(make_host, resident, index, ahead):
    images = make_host()
    for _ in range(2):
        if ahead is not None:
            images.prefetch(ahead)

        gathered = images.gather(index)

        assert torch.equal(gathered, resident[index])
        assert gathered.dtype == torch.uint8
        assert gathered.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == resident.shape
    assert len(images) == len(resident)


def test_host_images_read_a_batch_once_when_it_was_prefetched(make_host):
    log = []
    images = make_host(log)

    images.prefetch(INDEX)
    images.gather(INDEX)
    assert log == [[7, 0, 7, 3]]

    images.gather(INDEX)  # what was read ahead is handed over once
    assert log == [[7, 0, 7, 3]] * 2


def test_host_images_read_a_slice_once_when_it_was_prefetched(make_host, resident):
    log = []
    images = make_host(log)

    images.prefetch(slice(2, 5))
    assert torch.equal(images.gather(slice(2, 5)), resident[2:5])
    assert log == [[2, 3, 4]]

    images.prefetch(slice(2, 5))
    assert torch.equal(images.gather(torch.tensor([2, 3])), resident[2:4])
    assert torch.equal(images.gather(slice(2, 4)), resident[2:4])


def test_host_images_ignore_a_prefetch_of_another_batch(make_host, resident):
    log = []
    images = make_host(log)

    images.prefetch(OTHER)

    assert torch.equal(images.gather(INDEX), resident[INDEX])
    assert torch.equal(images.gather(OTHER), resident[OTHER])
    images._reader.submit(lambda: None).result()  # until what was read ahead is there
    assert sorted(log) == sorted([[7, 0, 3, 7], [7, 0, 7, 3], [7, 0, 3, 7]])


def test_host_images_report_an_error_of_reading_ahead_at_the_gather():
    def read(rows):
        raise ValueError(f"no row {rows[0]}")

    images = HostImages(read, np.arange(3), (3, 1, 1), cheap=False)
    images.prefetch(torch.tensor([2]))

    with pytest.raises(ValueError, match=r"no row 2"):
        images.gather(torch.tensor([2]))


def test_host_images_select_rows_and_go_to_a_device_unread(make_host, resident):
    log = []
    images = make_host(log, cheap=False)

    chosen = images.select(torch.tensor([8, 1, 5])).select(torch.tensor([2, 0])).to(CPU)

    assert log == []
    assert (len(chosen), chosen.shape, chosen.cheap) == (2, torch.Size((2, 3, 5, 6)), False)
    assert chosen.device == CPU
    assert torch.equal(chosen.gather(slice(None)), resident[[5, 8]])
    assert log == [[5, 8]]


def test_split_of_host_images_does_what_one_of_a_tensor_does(make_host, resident):
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    host = Split(make_host(), labels, 10.0, 4.0)
    tensor = Split(resident, labels, 10.0, 4.0)

    for change in (
        lambda split: split,
        lambda split: split.head(5),
        lambda split: split.select(torch.tensor([9, 2])),
        lambda split: split.to(CPU),
    ):
        ours, theirs = change(host), change(tensor)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.pixels(slice(None)), theirs.pixels(slice(None)))
        assert torch.equal(ours.batch(torch.tensor([1, 0])), theirs.batch(torch.tensor([1, 0])))
        assert len(ours) == len(theirs)
        assert isinstance(ours.images, HostImages)


def test_split_without_labels_says_so_and_still_has_a_head(resident):
    split = Split(resident, None, 0.0, 1.0)

    with pytest.raises(ValueError, match=r"the images of this split have no labels"):
        split.known_labels()
    assert torch.equal(split.head(3).images, resident[:3])
    assert len(split.head(99)) == 10
    assert split.head(3).labels is None
    assert split.select(torch.tensor([4])).to(CPU).labels is None


def test_split_known_labels_are_the_labels(resident):
    labels = torch.arange(10)
    assert torch.equal(Split(resident, labels, 0.0, 1.0).known_labels(), labels)


def test_split_normalises_each_channel_by_its_own_statistics(make_host, resident):
    mean, std = torch.tensor([100.0, 50.0, 0.0]), torch.tensor([1.0, 2.0, 10.0])
    expected = torch.stack(
        [(resident[:, c].double() - mean[c]) / std[c] for c in range(3)], dim=1
    ).float()

    for images in (resident, make_host()):
        split = Split(images, None, mean.view(3, 1, 1), std.view(3, 1, 1)).to(CPU)
        torch.testing.assert_close(split.batch(slice(None)), expected)
        assert torch.equal(split.normalise(split.pixels(INDEX)), split.batch(INDEX))


@pytest.mark.parametrize("cheap", [True, False])
def test_place_leaves_host_images_on_the_host_of_a_cpu(make_host, cheap):
    log = []
    splits = {"train": Split(make_host(log, cheap), torch.arange(10), 0.0, 1.0)}

    assert placement(splits, CPU, 1) == "host"
    placed = place(splits, CPU)
    assert isinstance(placed["train"].images, HostImages)
    assert torch.equal(placed["train"].labels, torch.arange(10))
    assert log == []


@pytest.mark.parametrize(("room", "expected"), [(1.0, "resident"), (0.99, "host")])
@pytest.mark.parametrize("processes", [1, 4])
def test_placement_on_cuda_asks_whether_the_images_of_all_processes_fit(
    make_host, monkeypatch, room, expected, processes
):
    splits = {name: Split(make_host(), None, 0.0, 1.0) for name in ("train", "test")}
    free = processes * room * 2 * 10 * 3 * 5 * 6 / data.RESIDENT_SHARE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))

    assert placement(splits, torch.device("cuda"), processes) == expected


def test_placement_on_cuda_decodes_no_file_in_advance(make_host, monkeypatch):
    splits = {"train": Split(make_host(cheap=False), None, 0.0, 1.0)}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))

    assert placement(splits, torch.device("cuda"), 1) == "host"


def test_place_reads_all_images_where_they_become_resident(make_host, resident, monkeypatch):
    monkeypatch.setattr(data, "placement", lambda *_: "resident")

    split = place({"train": Split(make_host(), torch.arange(10), 3.0, 2.0)}, CPU)["train"]

    assert isinstance(split.images, torch.Tensor)
    assert torch.equal(split.images, resident)
    assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert (split.mean, split.std) == (3.0, 2.0)
