import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from asg_env.tasks.listing import VISDA_CLASSES, read_visda_list, scan_class_folders
from asg_env.tasks.miniature import draw, main, write_class_folders, write_visda_tree
from asg_env.tasks.store import load_image


def files(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_visda_tree_has_the_layout_and_file_names_of_the_real_one(tmp_path):
    write_visda_tree(tmp_path, train=3, validation=2, seed=0)
    for split, count, name in (
        ("train", 3, r"src_[12]_\d{8}_[0-9a-f]{32}__\d+_\d+_\d+\.png"),
        ("validation", 2, r"[a-z]+_\d+\.jpg"),
    ):
        lines = (tmp_path / split / "image_list.txt").read_text().splitlines()
        assert len(lines) == 12 * count
        for line in lines:
            assert re.fullmatch(rf"[a-z]+/{name} \d+", line)
        assert sorted(f.name for f in (tmp_path / split).iterdir() if f.is_dir()) == [
            *VISDA_CLASSES
        ]


def test_trees_follow_the_seed(tmp_path):
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        write_visda_tree(tmp_path / name, train=1, validation=1, seed=seed, size=12)
    assert files(tmp_path / "a") == files(tmp_path / "again")
    assert files(tmp_path / "a").keys() != files(tmp_path / "b").keys()


def test_images_are_not_square():
    sizes = {draw(0, True, 48, np.random.default_rng(seed)).size for seed in range(10)}
    assert sizes == {(60, 48), (48, 60)}


def test_classes_can_be_learned_and_the_target_is_harder(tmp_path):
    """Nearest class mean of small images: far above chance, and worse across the domains."""
    write_visda_tree(tmp_path, train=16, validation=16, seed=0)
    pixels, labels = {}, {}
    for split in ("train", "validation"):
        found = read_visda_list(tmp_path / split)
        pixels[split] = np.stack(
            [load_image(found.root / path, 8).ravel() / 255.0 for path in found.paths]
        )
        labels[split] = np.array(found.labels)
    fitted = np.arange(192) % 16 < 8
    means = np.stack(
        [pixels["train"][fitted & (labels["train"] == label)].mean(0) for label in range(12)]
    )

    def accuracy(split, rows):
        distances = np.square(pixels[split][rows, None] - means).sum(2)
        return (distances.argmin(1) == labels[split][rows]).mean()

    assert accuracy("train", ~fitted) > 0.6
    assert 2 / 12 < accuracy("validation", slice(None)) < accuracy("train", ~fitted)


def test_class_folders_have_the_same_classes_in_both_domains(tmp_path):
    write_class_folders(tmp_path / "s", tmp_path / "t", images=2, seed=0)
    source, target = scan_class_folders(tmp_path / "s"), scan_class_folders(tmp_path / "t")
    assert source.classes == target.classes
    assert len(source) == len(target) == 8
    with Image.open(target.root / target.paths[0]) as picture:
        assert picture.format == "JPEG"


def test_main_writes_both_kinds(tmp_path):
    command = [sys.executable, "-m", "asg_env.tasks.miniature"]
    arguments = ["visda17", str(tmp_path / "v"), "--images", "1", "--seed", "3"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == f"written: {tmp_path / 'v'}\n"
    assert len(read_visda_list(tmp_path / "v/train")) == 12


def test_main_writes_class_folders_and_refuses_no_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["miniature", "imagefolder", str(tmp_path), "--images", "1"])
    main()
    assert len(scan_class_folders(tmp_path / "source")) == 4
    assert len(scan_class_folders(tmp_path / "target")) == 4
    monkeypatch.setattr(sys, "argv", ["miniature", "imagefolder", str(tmp_path), "--images", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--images must be >= 1, got 0" in capsys.readouterr().err
