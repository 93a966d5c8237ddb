import os
from pathlib import Path

import numpy as np
import pytest

from asg_env.tasks.listing import (
    VISDA_CLASSES,
    DataError,
    Listing,
    check_same_classes,
    read_visda_list,
    scan_class_folders,
    scan_unlabelled,
    stratified_division,
)
from asg_env.tasks.miniature import FOLDER_CLASSES, write_class_folders, write_visda_tree


@pytest.fixture
def write_list(tmp_path):
    """Write an image_list.txt; return its folder."""

    def write(content):
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / "image_list.txt").write_bytes(content)
        return tmp_path

    return write


@pytest.fixture
def touch(tmp_path):
    """Make empty files; listings open none."""

    def make(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        return tmp_path

    return make


def listing(paths, labels=None, classes=()):
    return Listing(Path("/data"), tuple(paths), labels, tuple(classes))


def one_sentence(caught):
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def test_visda_list_of_the_miniature_tree_has_its_classes_and_file_names(tmp_path):
    write_visda_tree(tmp_path, train=2, validation=1, seed=0)
    train = read_visda_list(tmp_path / "train")
    assert train.classes == VISDA_CLASSES
    assert train.labels == tuple(label for label in range(12) for _ in range(2))
    assert all((train.root / path).is_file() for path in train.paths)
    for path, label in train.rows_of_text():
        assert path.startswith(f"{VISDA_CLASSES[int(label)]}/src_")
    validation = read_visda_list(tmp_path / "validation")
    assert validation.paths[0] == "aeroplane/aeroplane_1363018.jpg"
    assert len(validation) == 12


def test_visda_list_skips_blank_lines_and_takes_tabs_byte_order_mark_and_dos_line_ends(write_list):
    folder = write_list("\ufeffcar/a.png\t3\r\n\r\n  ./car/b.png   3 \r\ntruck/c.png 11")
    found = read_visda_list(folder)
    assert found.paths == ("car/a.png", "car/b.png", "truck/c.png")
    assert found.labels == (3, 3, 11)


def test_visda_list_opens_no_image(write_list):
    assert read_visda_list(write_list("car/not_there.png 3\n")).paths == ("car/not_there.png",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"image_list.txt lists no images; unpack"),
        ("\n  \n", r"image_list.txt lists no images"),
        ("car/a.png 3\ncar/b.png\n", r"line 2 of .*image_list.txt must hold a path and a label"),
        (
            "car/my car.png 3\n",
            r"line 1 of .* must hold a path and a label, got 'car/my c",
        ),
        ("\ncar/a.png x\n", r"line 2 of .* an integer from 0 to 11 as label, got 'x'"),
        ("car/a.png 12\n", r"line 1 of .* an integer from 0 to 11 as label, got '12'"),
        ("car/a.png -1\n", r"got '-1'"),
        ("car/a.png 3.0\n", r"got '3.0'"),
        (
            "/data/car/a.png 3\n",
            r"line 1 of .* must name an image inside .*, got '/data/ca",
        ),
        ("car/../../a.png 3\n", r"must name an image inside .*, got 'car/../../a.png'"),
        ("car/a.png 3\ncar//a.png 3\n", r"line 2 of .* repeats 'car/a.png'; remove one"),
        (b"car/\xff.png 3\n", r"image_list.txt must be UTF-8 text, got byte 0xff at position 4"),
        ("car/\0.png 3\n", r"an image called 'car/\\x00.png', a name with control characters"),
    ],
)
def test_visda_list_is_refused_when_it_is_malformed(write_list, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_visda_list(write_list(content))
    one_sentence(caught)


def test_visda_list_is_refused_when_it_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"image_list.txt is missing; give the folder") as caught:
        read_visda_list(tmp_path / "nothing")
    one_sentence(caught)
    (tmp_path / "image_list.txt").mkdir()
    with pytest.raises(DataError, match=r"image_list.txt cannot be read \(Is a directory\)"):
        read_visda_list(tmp_path)


def test_class_folders_are_numbered_by_name_and_scanned_to_any_depth(touch):
    root = touch("b/2.PNG", "b/deep/er/1.jpeg", "a/x.webp", "a/x.txt", "loose.png", "notes/a.tif")
    found = scan_class_folders(root)
    assert found.classes == ("a", "b", "notes")
    assert found.paths == ("a/x.webp", "b/2.PNG", "b/deep/er/1.jpeg", "notes/a.tif")
    assert found.labels == (0, 1, 1, 2)


def test_class_folders_leave_hidden_files_and_folders_out(touch):
    found = scan_class_folders(touch("a/1.png", "a/._1.png", "a/.cache/2.png", ".git/3.png"))
    assert (found.paths, found.classes) == (("a/1.png",), ("a",))


def test_class_folders_may_be_links(touch, tmp_path):
    touch("elsewhere/photos/1.png", "root/a/2.png")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    assert scan_class_folders(tmp_path / "root").paths == ("a/2.png", "b/photos/1.png")


def test_scan_refuses_a_loop_of_links(touch):
    root = touch("a/1.png")
    (root / "a/again").symlink_to(root / "a")
    with pytest.raises(DataError, match=r"a/again links to a folder that is listed already"):
        scan_class_folders(root)


def test_scan_refuses_names_that_break_a_list(touch):
    with pytest.raises(DataError, match=r"an image called 'a/x\\ty.png'.*rename it"):
        scan_class_folders(touch("a/x\ty.png"))


def test_scan_refuses_names_that_are_no_utf8(tmp_path):
    (tmp_path / "a").mkdir()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"an image called 'a/\\udcff.png'.*not in UTF-8"):
        scan_unlabelled(tmp_path)


def test_scan_refuses_a_folder_it_may_not_read(touch, monkeypatch):
    root = touch("a/1.png", "a/locked/2.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=r"a/locked cannot be read \(Permission denied\)"):
        scan_class_folders(root)


def test_class_folders_are_refused_when_there_are_none_or_one_is_empty(touch, tmp_path):
    with pytest.raises(DataError, match=r"gone is no folder; give one that holds a folder per"):
        scan_class_folders(tmp_path / "gone")
    with pytest.raises(DataError, match=r"loose.png is no folder"):
        scan_class_folders(touch("loose.png") / "loose.png")
    with pytest.raises(DataError, match=r"holds no class folders; put the images of each class"):
        scan_class_folders(tmp_path)
    touch("a/1.png", "b/readme.txt")
    with pytest.raises(DataError, match=r"/b holds no images \(.png .*\); add some") as e:
        scan_class_folders(tmp_path)
    one_sentence(e)


def test_unlabelled_scan_takes_every_image_below_the_folder(touch, tmp_path):
    found = scan_unlabelled(touch("2.png", "x/1.jpg", "x/.hidden.jpg", "x/list.txt"))
    assert found.paths == ("2.png", "x/1.jpg")
    assert found.labels is None
    assert found.classes == ()
    with pytest.raises(DataError, match=r"gone is no folder"):
        scan_unlabelled(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images"):
        scan_unlabelled(tmp_path / "empty")


def test_same_classes_are_accepted_and_others_named(tmp_path):
    write_class_folders(tmp_path / "s", tmp_path / "t", images=1, seed=0)
    source, target = scan_class_folders(tmp_path / "s"), scan_class_folders(tmp_path / "t")
    assert source.classes == target.classes == FOLDER_CLASSES
    check_same_classes(source, target)
    (tmp_path / "t/star").rename(tmp_path / "t/stars")
    (tmp_path / "t/disc").rename(tmp_path / "t/discs")
    with pytest.raises(
        DataError, match=r"only .*/s has disc, star and only .*/t has discs, stars; rename"
    ) as caught:
        check_same_classes(source, scan_class_folders(tmp_path / "t"))
    one_sentence(caught)


def test_select_keeps_paths_and_labels_together():
    whole = listing("abc", (0, 1, 0), "xy")
    assert whole.select(np.array([2, 1])) == listing("cb", (0, 1), "xy")
    assert listing("abc").select([0]) == listing("a")


def test_fingerprint_notices_what_changed_and_survives_a_move(touch, tmp_path):
    touch("r/a/1.png", "r/b/2.png")
    first = scan_class_folders(tmp_path / "r")
    print_ = first.fingerprint()
    assert first.fingerprint() == print_
    assert scan_unlabelled(tmp_path / "r").fingerprint() != print_
    (tmp_path / "r").rename(tmp_path / "moved")
    moved = scan_class_folders(tmp_path / "moved")
    assert moved.fingerprint() == print_
    file = tmp_path / "moved/a/1.png"
    stamp = file.stat().st_mtime_ns
    os.utime(file, ns=(stamp, stamp + 1))
    assert moved.fingerprint() != print_
    os.utime(file, ns=(stamp, stamp))
    assert moved.fingerprint() == print_
    file.write_bytes(b"x")
    os.utime(file, ns=(stamp, stamp))
    assert moved.fingerprint() != print_


def test_fingerprint_names_the_first_missing_image_and_counts_them(touch, tmp_path):
    touch("a/1.png", "a/2.png", "a/3.png")
    found = scan_class_folders(tmp_path)
    (tmp_path / "a/2.png").unlink()
    (tmp_path / "a/3.png").unlink()
    with pytest.raises(DataError, match=r"a/2.png is missing \(2 of the 3 listed") as e:
        found.fingerprint()
    one_sentence(e)


@pytest.fixture
def thirty():
    """Three classes of 15, 10 and 5 images."""
    labels = (0,) * 15 + (1,) * 10 + (2,) * 5
    return listing([f"{label}/{n}.png" for n, label in enumerate(labels)], labels, "xyz")


def sides(divided, parts):
    return [{divided.paths[row] for row in part} for part in parts]


def test_division_is_stratified_disjoint_and_complete(thirty):
    first, rest = stratified_division(thirty, 0.2, seed=0)
    assert first.dtype == rest.dtype == np.int64
    assert sorted([*first, *rest]) == list(range(30))
    assert (np.diff(first) > 0).all()
    assert (np.diff(rest) > 0).all()
    assert np.bincount(np.array(thirty.labels)[first]).tolist() == [3, 2, 1]


def test_division_follows_the_documented_rule(thirty):
    import hashlib

    first, _ = stratified_division(thirty, 0.5, seed=7)
    order = sorted(
        thirty.paths[15:25], key=lambda path: hashlib.sha256(f"7/{path}".encode()).hexdigest()
    )
    assert {path for path in sides(thirty, [first])[0] if path.startswith("1/")} == set(order[:5])


def test_division_does_not_depend_on_the_order_of_the_list(thirty):
    shuffled = thirty.select(np.random.default_rng(0).permutation(30))
    assert sides(thirty, stratified_division(thirty, 0.3, 1)) == sides(
        shuffled, stratified_division(shuffled, 0.3, 1)
    )
    assert sides(thirty, stratified_division(thirty, 0.3, 1)) != sides(
        thirty, stratified_division(thirty, 0.3, 2)
    )


def test_division_hardly_moves_when_an_image_is_removed(thirty):
    first, rest = sides(thirty, stratified_division(thirty, 0.4, 0))
    for gone in range(30):
        fewer = thirty.select([row for row in range(30) if row != gone])
        new_first, new_rest = sides(fewer, stratified_division(fewer, 0.4, 0))
        moved = (new_first - first) | (new_rest - rest)
        assert len(moved) <= 1
        assert all(path[0] == thirty.paths[gone][0] for path in moved)


def test_division_leaves_at_least_one_image_of_every_class_on_either_side(thirty):
    for fraction, counts in ((0.01, [1, 1, 1]), (0.99, [14, 9, 4])):
        first, _ = stratified_division(thirty, fraction, 0)
        assert np.bincount(np.array(thirty.labels)[first]).tolist() == counts


def test_division_with_fraction_zero_leaves_the_first_part_empty(thirty):
    first, rest = stratified_division(thirty, 0, 0)
    assert (len(first), len(rest)) == (0, 30)
    assert first.dtype == np.int64


def test_division_takes_unlabelled_images_as_one_class():
    first, rest = stratified_division(listing("abcdefghij"), 0.3, 0)
    assert (len(first), len(rest)) == (3, 7)


def test_division_is_refused_when_a_class_is_too_small_or_the_fraction_out_of_bounds(thirty):
    single = thirty.select(range(26))
    with pytest.raises(DataError, match=r"class z of /data must have at least 2 .*, got 1; add"):
        stratified_division(single, 0.5, 0)
    stratified_division(single, 0, 0)
    with pytest.raises(DataError, match=r"class \(unlabelled\) .* got 1"):
        stratified_division(listing("a"), 0.5, 0)
    for fraction in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match=r"`fraction` must be >= 0 and < 1, got"):
            stratified_division(thirty, fraction, 0)
