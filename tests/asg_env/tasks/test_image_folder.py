import shutil

import pytest

from asg_env.tasks.image_folder import list_images, load_task
from asg_env.tasks.listing import DataError
from asg_env.tasks.miniature import FOLDER_CLASSES

DEFAULTS = {
    **{"backbone": "torchvision:shufflenet_v2_x0_5", "weights": "random", "image_size": 32},
    **{"store": None, "head": "mlp", "layer_groups": None, "split_seed": 0},
    **{"inner_valid_fraction": 0.02, "outer_valid_fraction": 0.2},
}


@pytest.fixture
def own_folders(image_folders, tmp_path):
    """Folders that a test may change."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in image_folders]


def test_both_domains_have_the_folders_as_classes(image_folders):
    listings = list_images(*image_folders, target_labels=True)

    assert {listing.classes for listing in listings.values()} == {FOLDER_CLASSES}
    assert [listings[name].root for name in ("source", "target")] == list(image_folders)


def test_target_without_labels_may_lie_in_any_folders(own_folders):
    source, target = own_folders
    (target / "star").rename(target / "holiday")

    listings = list_images(source, target, target_labels=False)

    assert listings["target"].labels is None
    assert len(listings["target"]) == 24
    task = load_task(str(source), str(target), False, **DEFAULTS)
    assert set(task.splits) == {"train", "inner_valid", "outer_valid", "old_task"}


def test_splits_divide_each_class_by_hand(image_folders):
    # Of 6 images round(0.12) = 0, so one, and round(1.2) = 1 are held out.
    task = load_task(*map(str, image_folders), True, **DEFAULTS)

    sizes = {"inner_valid": 1, "train": 5, "outer_valid": 1, "test": 5}
    for name, per_class in sizes.items():
        assert task.splits[name].labels.bincount().tolist() == [per_class] * 4
    assert (task.id, task.reference_digest) == ("ASG/ImageFolder-v0", None)


def test_a_store_alone_stands_for_both_folders(image_folders, make_store):
    store = str(make_store(list_images(*image_folders, target_labels=True)))

    task = load_task(None, None, True, **DEFAULTS | {"store": store})

    assert len(task.splits["test"]) == 20


def test_other_classes_are_refused_and_both_sides_listed(own_folders):
    source, target = own_folders
    (target / "star").rename(target / "sun")
    shutil.copytree(source / "disc", source / "coin")

    message = (
        rf"source and target must have the same classes, but only {source} has coin, star and "
        rf"only {target} has sun; rename or remove these"
    )
    with pytest.raises(DataError, match=message):
        load_task(str(source), str(target), True, **DEFAULTS)


def test_class_of_a_single_image_cannot_be_divided(own_folders):
    source, target = own_folders
    for file in sorted((target / "star").iterdir())[1:]:
        file.unlink()

    with pytest.raises(DataError, match=r"class star of .* at least 2 images .* got 1; add some"):
        load_task(str(source), str(target), True, **DEFAULTS)
    whole = DEFAULTS | {"outer_valid_fraction": 0.0}
    assert len(load_task(str(source), str(target), True, **whole).splits["test"]) == 19


@pytest.mark.parametrize("side", [0, 1])
def test_folder_that_is_missing_is_named(image_folders, tmp_path, side):
    folders = list(map(str, image_folders))
    folders[side] = str(tmp_path / "gone")

    with pytest.raises(DataError, match=r"gone is no folder; give one that holds"):
        load_task(*folders, True, **DEFAULTS)
