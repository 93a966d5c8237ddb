import shutil

import pytest

from asg_env.build import build_trainer
from asg_env.task_settings import VisDA17Settings
from asg_env.tasks.listing import VISDA_CLASSES, DataError
from asg_env.tasks.visda17 import list_images, load_task
from asg_env.validation import validate

RESNET = {"backbone": "torchvision:resnet18", "weights": "random", "image_size": 32}
DEFAULTS = {
    **RESNET,
    **{"store": None, "head": "mlp", "layer_groups": None, "split_seed": 0},
    **{"inner_valid_fraction": 0.02, "outer_valid_fraction": 0.2},
}


def test_domains_are_renders_and_photographs(visda_root):
    listings = list_images(visda_root)

    assert list(listings) == ["source", "target"]
    assert listings["source"].root == visda_root / "train"
    assert listings["target"].root == visda_root / "validation"
    assert [len(listing) for listing in listings.values()] == [12 * 5, 12 * 4]
    assert {listing.classes for listing in listings.values()} == {VISDA_CLASSES}


def test_splits_divide_each_class_by_hand(visda_root):
    # Of 5 renders round(0.1) = 0, so one, and of 4 photographs round(0.8) = 1 are held out.
    task = load_task(str(visda_root), **DEFAULTS)

    sizes = {"inner_valid": 1, "train": 4, "outer_valid": 1, "test": 3}
    for name, per_class in sizes.items():
        assert task.splits[name].labels.bincount().tolist() == [per_class] * 12
    assert task.id == "ASG/VisDA17-v0"
    assert task.summary
    assert (len(task.digest), task.reference_digest) == (64, None)


def test_original_protocol_tests_on_every_photograph(visda_root):
    task = load_task(str(visda_root), **DEFAULTS | {"outer_valid_fraction": 0.0})

    assert set(task.splits) == {"train", "inner_valid", "test"}
    assert task.splits["test"].labels.bincount().tolist() == [4] * 12


def test_a_store_alone_stands_for_the_folder(visda_root, make_store):
    store = str(make_store(list_images(visda_root)))

    task = load_task(None, **DEFAULTS | {"store": store})

    assert {name: len(s) for name, s in task.splits.items()} == {
        name: len(s) for name, s in load_task(str(visda_root), **DEFAULTS).splits.items()
    }


def test_settings_reach_the_network(visda_root):
    settings = validate(VisDA17Settings, {**RESNET, "root": str(visda_root)}, "env")
    trainer = build_trainer("ASG/VisDA17-v0", settings)

    groups = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "head")
    assert trainer.layer_groups == groups
    head = trainer.optimizee.head
    assert [(head[i].in_features, head[i].out_features) for i in (0, 2)] == [(512, 512), (512, 12)]
    assert trainer.settings.flip_average


def test_folder_without_the_lists_is_refused(visda_root, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(visda_root, root)
    (root / "validation/image_list.txt").unlink()
    with pytest.raises(DataError, match=r"validation/image_list.txt is missing; give the folder t"):
        load_task(str(root), **DEFAULTS)
    with pytest.raises(DataError, match=r"gone/train/image_list.txt is missing"):
        load_task(str(tmp_path / "gone"), **DEFAULTS)


def test_label_out_of_range_is_named_by_its_line(visda_root, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(visda_root, root)
    file = root / "train/image_list.txt"
    file.write_text(file.read_text().replace(" 11\n", " 12\n", 1))
    with pytest.raises(DataError, match=r"line 56 of .*train/image_list.txt must have an integer "):
        load_task(str(root), **DEFAULTS)
