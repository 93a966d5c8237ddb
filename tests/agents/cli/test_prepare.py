import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import typer
from rich.console import Console

import agents.cli.options
import agents.cli.prepare
from agents.cli.prepare import prepare_command
from asg_env.tasks import preparation
from asg_env.tasks.miniature import write_class_folders, write_visda_tree
from asg_env.tasks.store import Store
from asg_env.validation import ConfigError


@pytest.fixture
def asg_prepare(capsys):
    """Run the command in this process; return what it printed."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("prepare")(prepare_command)

    def run(*arguments):
        app([*map(str, arguments)], standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture(autouse=True)
def _inline(monkeypatch):
    monkeypatch.setattr(preparation, "_pool", lambda workers: ThreadPoolExecutor(1))


@pytest.fixture(scope="module")
def visda(tmp_path_factory):
    root = tmp_path_factory.mktemp("visda")
    write_visda_tree(root, train=2, validation=1, seed=0, size=20)
    return root


@pytest.fixture
def folders(tmp_path):
    write_class_folders(tmp_path / "s", tmp_path / "t", images=3, seed=0, size=20)
    return tmp_path / "s", tmp_path / "t"


def test_prepare_makes_a_store_of_visda17_and_says_what_it_wrote(asg_prepare, visda, tmp_path):
    out = tmp_path / "store"
    printed = asg_prepare("visda17", visda, "--out", out, "--image-size", 16)
    assert printed.endswith(
        f"written: {out}, images of 16 pixels, 27,648 bytes\n"
        "source: 24 images, 0 broken\ntarget: 12 images, 0 broken\n"
    )
    store = Store.open(out)
    assert (store.size, len(store.listing("source")), len(store.listing("target"))) == (16, 24, 12)
    again = asg_prepare("visda17", visda, "--out", out, "--image-size", 16)
    assert again.startswith(f"finished already: {out}, images of 16 pixels")


def test_prepare_makes_a_store_of_224_pixels_if_not_told_otherwise(asg_prepare, folders, tmp_path):
    asg_prepare("imagefolder", *folders, "--out", tmp_path / "store")
    assert Store.open(tmp_path / "store").size == 224


def test_prepare_takes_a_target_without_class_folders(asg_prepare, folders, tmp_path):
    source, target = folders
    for number, file in enumerate(sorted(target.glob("*/*"))):
        file.rename(target / f"{number}.jpg")
    shutil.rmtree(target / "disc")
    asg_prepare(
        "imagefolder", source, target, "--unlabelled", "--out", tmp_path / "o", "--image-size", 16
    )
    store = Store.open(tmp_path / "o")
    assert store.listing("target").labels is None
    assert len(store.listing("target")) == 12


def test_prepare_prints_about_twenty_lines_off_a_terminal(
    asg_prepare, visda, tmp_path, monkeypatch
):
    monkeypatch.setattr(preparation, "CHUNK", 1)
    printed = asg_prepare("visda17", visda, "--out", tmp_path / "store", "--image-size", 8)
    lines = [line for line in printed.splitlines() if "images/s" in line]
    assert 15 <= len(lines) <= 20
    assert lines[-1].startswith("36/36 images  ")
    assert lines[-1].endswith(" images/s  0 broken")


def test_prepare_draws_one_bar_on_a_terminal(asg_prepare, visda, tmp_path, monkeypatch):
    monkeypatch.setattr(agents.cli.options, "console", Console(force_terminal=True, width=110))
    printed = asg_prepare("visda17", visda, "--out", tmp_path / "store", "--image-size", 8)
    assert "36/36 images" in printed
    assert "ETA" in printed
    assert "images/s  0 broken" in printed


def test_prepare_lists_the_first_ten_broken_images(asg_prepare, folders, tmp_path):
    source, _ = folders
    for file in source.glob("*/*"):
        file.write_bytes(b"broken")
    command = ("imagefolder", *folders, "--out", tmp_path / "o", "--image-size", 16)
    with pytest.raises(ConfigError, match=r"12 of the 12 images of source are broken"):
        asg_prepare(*command)
    printed = asg_prepare(*command, "--max-broken", 1)
    assert "source: 12 images, 12 broken" in printed
    assert printed.count("broken: source/") == 10
    assert "broken: source/cross/0000.png" in printed
    assert f"and 2 more: see {tmp_path / 'o' / 'manifest.json'}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("coco", "{v}"),
            r"KIND must be one of visda17, imagefolder, got 'coco'; give one of them",
        ),
        (
            ("visda17", "{v}", "{s}"),
            r"visda17 takes 1 folder\(s\) \(the folder with train/ .* got 2",
        ),
        (("imagefolder", "{s}"), r"imagefolder takes 2 folder\(s\) \(source, target\), got 1"),
        (("visda17", "{v}", "--unlabelled"), r"--unlabelled belongs to imagefolder; leave it out"),
        (("visda17", "{s}"), r"train/image_list.txt is missing; give the folder that holds train/"),
        (
            ("imagefolder", "{s}", "{v}/train"),
            r"only .*/s has cross, disc, star, triangle and only",
        ),
    ],
)
def test_prepare_refuses_arguments_that_do_not_fit(
    asg_prepare, visda, folders, tmp_path, arguments, message
):
    named = [argument.format(v=visda, s=folders[0]) for argument in arguments]
    with pytest.raises(ConfigError, match=message):
        asg_prepare(*named, "--out", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_prepare_refuses_a_store_among_the_images(asg_prepare, folders):
    source, target = folders
    with pytest.raises(ConfigError, match=r"--out must lie outside the image folder .*/s, got"):
        asg_prepare("imagefolder", source, target, "--out", source / "store")
    assert not (source / "store").exists()


def test_prepare_says_how_to_go_on_when_it_is_interrupted(
    asg_prepare, folders, tmp_path, monkeypatch, capsys
):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "my store"
    monkeypatch.setattr(agents.cli.prepare, "prepare", interrupted)
    app = typer.Typer()
    app.command()(prepare_command)
    with pytest.raises(KeyboardInterrupt):
        prepare_command("imagefolder", [*folders], out, 16, 2, 0.5, True)
    assert capsys.readouterr().out == (
        "interrupted; what is finished stands: the same command goes on\n"
        f"  asg prepare imagefolder {folders[0]} {folders[1]} --out '{out}' --image-size 16 "
        "--workers 2 --max-broken 0.5 --unlabelled\n"
    )
