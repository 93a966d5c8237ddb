import errno
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from asg_env.tasks import preparation
from asg_env.tasks.listing import DataError, Listing, read_visda_list
from asg_env.tasks.miniature import write_visda_tree
from asg_env.tasks.store import Store

SIZE = 16
CHUNK = 16  # 4 chunks of source, 1 of target

# Runs in a process of its own: prepare TREE STORE, and do `{effect}` after every chunk.
SCRIPT = """
import multiprocessing, os, resource, signal, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from asg_env.tasks import preparation
from asg_env.tasks.listing import DataError, read_visda_list

def effect(done, total, broken):
    {effect}

def main():
    {setup}
    preparation.CHUNK = 16
    listings = {{
        "source": read_visda_list(Path(sys.argv[1], "train")),
        "target": read_visda_list(Path(sys.argv[1], "validation")),
    }}
    try:
        preparation.prepare(listings, Path(sys.argv[2]), 16, 2, 0.0, effect)
    except DataError as error:
        print(error)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK", CHUNK)


@pytest.fixture
def _inline(monkeypatch):
    """Workers are a thread of this process, so that patches reach them."""
    monkeypatch.setattr(preparation, "_pool", lambda workers: ThreadPoolExecutor(1))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("visda") / "tree"
    write_visda_tree(root, train=5, validation=1, seed=0, size=20)
    return root


@pytest.fixture
def own_tree(tree, tmp_path):
    return shutil.copytree(tree, tmp_path / "tree")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "store"


def domains(root):
    return {
        "source": read_visda_list(root / "train"),
        "target": read_visda_list(root / "validation"),
    }


def prepare(root, out, size=SIZE, workers=1, max_broken=0.0, progress=lambda *_: None):
    return preparation.prepare(domains(root), out, size, workers, max_broken, progress)


def log_of(out):
    return [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]


def contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


class StopError(Exception):
    pass


def stop_after(chunks):
    """Return a progress function that raises at the given chunk, as an interrupt would."""

    def progress(done, total, broken):
        if done == chunks * CHUNK:
            raise StopError

    return progress


@pytest.fixture(scope="module")
def reference(tree, tmp_path_factory):
    """Bytes of a store that was written without an interruption."""
    folder = tmp_path_factory.mktemp("reference") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "CHUNK", CHUNK)
        patch.setattr(preparation, "_pool", ThreadPoolExecutor)
        prepare(tree, folder)
    return contents(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_writes_the_same_bytes_with_any_number_of_workers(tree, out, workers, reference):
    prepare(tree, out, workers=workers)
    assert contents(out) == reference


@pytest.mark.usefixtures("_inline")
def test_prepare_reports_every_chunk(own_tree, out):
    broken = own_tree / "train" / domains(own_tree)["source"].paths[20]
    broken.write_bytes(b"")
    seen = []
    prepare(own_tree, out, max_broken=0.1, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(16, 72, 0), (32, 72, 1), (48, 72, 1), (60, 72, 1), (72, 72, 1)]


def run_script(tree, out, effect, setup):
    """Run `prepare` in a process of its own."""
    script = SCRIPT.format(effect=effect, setup=setup)
    command = [sys.executable, "-c", script, str(tree), str(out)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.usefixtures("_inline")
def test_prepare_resumes_after_the_process_was_killed(tree, out, reference):
    effect = "done == 32 and os.kill(os.getpid(), signal.SIGKILL)"
    killed = run_script(tree, out, effect, "preparation._pool = ThreadPoolExecutor")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    header, *records = log_of(out)
    assert header["format"] == "asg-env image store"
    assert [record["start"] for record in records] == [0, CHUNK]
    with pytest.raises(DataError, match=r"has no manifest.json, so it is unfinished"):
        Store.open(out)
    prepare(tree, out)
    assert contents(out) == reference


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes by Linux's pidfd")
def test_prepare_leaves_no_worker_behind_when_it_is_killed(tree, out, reference):
    effect = (
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = run_script(tree, out, effect, "pass")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workers = killed.stdout.split()
    assert len(workers) == 2
    for worker in workers:
        try:
            descriptor = os.pidfd_open(int(worker))
        except ProcessLookupError:
            continue  # it is gone already
        ended, _, _ = select.select([descriptor], [], [], 60)
        os.close(descriptor)
        assert ended
    prepare(tree, out, workers=2)
    assert contents(out) == reference


@pytest.mark.usefixtures("_inline")
def test_prepare_decodes_finished_chunks_no_second_time(tree, out, monkeypatch, reference):
    with pytest.raises(StopError):
        prepare(tree, out, progress=stop_after(3))
    load_image = preparation.load_image
    decoded = []

    def counted(path, size):
        decoded.append(path)
        return load_image(path, size)

    monkeypatch.setattr(preparation, "load_image", counted)
    finished = sum(len(record) > 0 for record in log_of(out)[1:])
    assert finished == 3
    prepare(tree, out)
    assert len(decoded) == 72 - 3 * CHUNK
    assert contents(out) == reference


@pytest.mark.usefixtures("_inline")
def test_prepare_ignores_a_torn_last_line_and_appends_after_the_whole_ones(tree, out, reference):
    with pytest.raises(StopError):
        prepare(tree, out, progress=stop_after(3))
    log = out / "progress.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    with pytest.raises(StopError):
        prepare(tree, out, progress=stop_after(3))
    assert [record["start"] for record in log_of(out)[1:]] == [0, CHUNK, 2 * CHUNK]
    prepare(tree, out)
    assert contents(out) == reference


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("torn", [b"", b'{"format": "asg-e', b"\0\0\0\n\0"])
def test_prepare_starts_over_when_the_header_is_torn(tree, out, torn, reference):
    out.mkdir()
    (out / "progress.jsonl").write_bytes(torn)
    prepare(tree, out)
    assert contents(out) == reference


@pytest.mark.usefixtures("_inline")
def test_prepare_redoes_chunks_whose_bytes_are_not_those_logged(tree, out, reference):
    with pytest.raises(StopError):
        prepare(tree, out, progress=stop_after(3))
    with (out / "source.u8").open("r+b") as file:
        file.seek(CHUNK * SIZE * SIZE * 3)
        file.write(b"lost in a crash")
    prepare(tree, out)
    assert contents(out) == reference


@pytest.mark.usefixtures("_inline")
def test_prepare_remembers_broken_images_of_an_earlier_run(own_tree, out):
    path = domains(own_tree)["source"].paths[0]
    (own_tree / "train" / path).write_bytes(b"broken")
    with pytest.raises(StopError):
        prepare(own_tree, out, max_broken=0.1, progress=stop_after(2))
    manifest = prepare(own_tree, out, max_broken=0.1)
    assert manifest["domains"]["source"]["broken"] == [path]


@pytest.mark.usefixtures("_inline")
def test_prepare_returns_at_once_when_the_store_is_finished(tree, out, monkeypatch):
    first = prepare(tree, out)
    (out / "progress.jsonl").touch()  # killed between manifest and removal
    monkeypatch.setattr(preparation, "_pool", None)
    assert prepare(tree, out) == first
    assert not (out / "progress.jsonl").exists()


@pytest.mark.usefixtures("_inline")
@pytest.mark.parametrize("finished", [False, True])
def test_prepare_refuses_to_go_on_with_other_images_or_another_size(own_tree, out, finished):
    if finished:
        prepare(own_tree, out)
    else:
        with pytest.raises(StopError):
            prepare(own_tree, out, progress=stop_after(1))
    with pytest.raises(
        DataError,
        match=r"differs in the transform \(16 pixels there, 8 here\); delete the fol",
    ):
        prepare(own_tree, out, size=8)
    os.utime(own_tree / "train" / domains(own_tree)["source"].paths[-1], (1, 1))
    with pytest.raises(DataError, match=r"the images of source \(files or labels changed\)"):
        prepare(own_tree, out)
    (own_tree / "validation/image_list.txt").write_text("aeroplane/aeroplane_1363018.jpg 0\n")
    with pytest.raises(DataError, match=r"the images of target \(12 there, 1 here\); delete"):
        prepare(own_tree, out)


@pytest.mark.usefixtures("_inline")
def test_prepare_refuses_to_go_on_with_another_decoder(tree, out, monkeypatch):
    with pytest.raises(StopError):
        prepare(tree, out, progress=stop_after(1))
    monkeypatch.setattr("asg_env.tasks.store.metadata.version", lambda name: "99")
    with pytest.raises(DataError, match=r"differs in the packages \({'pillow'.*'99'} here\)"):
        prepare(tree, out)


def test_prepare_leaves_a_folder_of_something_else_alone(tree, out):
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"store is not empty and no image store; choose another"):
        prepare(tree, out)
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


def test_prepare_refuses_a_place_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/store cannot be written \(Not a directory\)"):
        prepare(tree, tmp_path / "file/store")


def test_prepare_refuses_missing_images_before_it_writes(own_tree, out):
    (own_tree / "train" / domains(own_tree)["source"].paths[0]).unlink()
    with pytest.raises(DataError, match=r"is missing \(1 of the 60 listed images are\)"):
        prepare(own_tree, out)
    assert not out.exists()


def test_prepare_refuses_domains_of_different_classes(tree, out):
    listings = domains(tree)
    target = listings["target"]
    other = Listing(target.root, target.paths, target.labels, ("x", *target.classes[1:]))
    with pytest.raises(DataError, match=r"only .*train has aeroplane and only .*validation has x"):
        preparation.prepare({**listings, "target": other}, out, SIZE, 1, 0.0, lambda *_: None)


@pytest.mark.usefixtures("_inline")
def test_prepare_refuses_more_broken_images_than_allowed_and_keeps_the_rest(own_tree, out):
    paths = domains(own_tree)["source"].paths
    for row in (1, 30, 31, 59):
        (own_tree / "train" / paths[row]).write_bytes(b"broken")
    with pytest.raises(
        DataError,
        match=r"4 of the 60 images of source are broken, a share of 0.067 where at most 0.05 may "
        rf"be \({paths[1]}, {paths[30]}, {paths[31]}, ...\); mend them, or raise --max-broken",
    ):
        prepare(own_tree, out, max_broken=0.05)
    assert not (out / "manifest.json").exists()
    manifest = prepare(own_tree, out, max_broken=4 / 60)
    assert manifest["domains"]["source"]["broken"] == [paths[row] for row in (1, 30, 31, 59)]
    for bound in (0.06, float("nan")):
        with pytest.raises(DataError, match=r"4 of the 60 images of source are broken"):
            prepare(own_tree, out, max_broken=bound)


@pytest.mark.usefixtures("_inline")
def test_prepare_stops_as_soon_as_too_many_images_are_broken(own_tree, out):
    paths = domains(own_tree)["source"].paths
    for row in (0, 1, 20, 40):  # 2 in the first chunk, 1 in the second
        (own_tree / "train" / paths[row]).write_bytes(b"broken")
    seen = []
    with pytest.raises(
        DataError,
        match=r"^3 of the 60 images of source are broken, and only 32 were read, a share of 0.05 ",
    ):
        prepare(own_tree, out, max_broken=2 / 60, progress=lambda *numbers: seen.append(numbers))
    assert [done for done, _, _ in seen] == [16, 32]
    manifest = prepare(own_tree, out, max_broken=4 / 60)  # goes on from there
    assert manifest["domains"]["source"]["broken"] == [paths[row] for row in (0, 1, 20, 40)]


def test_prepare_refuses_an_image_file_that_cannot_be_read(own_tree, out):
    file = own_tree / "train" / domains(own_tree)["source"].paths[0]
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r".png cannot be read \(Is a directory\); mend that first"):
        prepare(own_tree, out)


def test_prepare_finds_out_at_the_start_that_a_file_may_not_be_as_large(tree, out):
    limit = 60 * SIZE * SIZE * 3 - 1
    setup = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    effect = "raise AssertionError('decoded something')"
    refused = run_script(tree, out, effect, setup)
    assert refused.returncode == 0, refused.stderr
    assert "cannot hold the store (File too large): it takes 55,296 bytes, " in refused.stdout
    assert "run the same command again to go on, or choose another --out" in refused.stdout
    assert (out / "source.u8").stat().st_size == 0


@pytest.mark.usefixtures("_inline")
def test_prepare_gives_all_space_back_when_the_last_file_does_not_fit(tree, out, monkeypatch):
    calls = []

    def fallocate(descriptor, offset, size):
        calls.append(size)
        if len(calls) == 2:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        os.ftruncate(descriptor, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
    with pytest.raises(DataError, match=r"cannot hold the store \(Disk quota exceeded\): it takes"):
        prepare(tree, out)
    assert calls == [60 * SIZE * SIZE * 3, 12 * SIZE * SIZE * 3]
    assert [(out / f"{name}.u8").stat().st_size for name in ("source", "target")] == [0, 0]


@pytest.mark.usefixtures("_inline")
def test_prepare_goes_on_after_the_disk_was_full(tree, out, monkeypatch, reference):
    pwrite = os.pwrite
    calls = []

    def nearly_full(descriptor, data, offset):
        calls.append(len(data))
        if len(calls) >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data[:5000], offset)  # and never a whole chunk at once

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", nearly_full)
        with pytest.raises(
            DataError,
            match=r"cannot hold the store \(No space left on device\): it takes 55,296 bytes, "
            r"[\d,]+ are free; make room and run the same command again",
        ):
            prepare(tree, out)
    assert calls[:4] == [12288, 7288, 2288, 12288]
    assert [record["start"] for record in log_of(out)[1:]] == [0]
    prepare(tree, out)
    assert contents(out) == reference


def test_prepare_says_so_when_a_worker_is_killed(tree, out, monkeypatch):
    monkeypatch.setattr(preparation, "follow_parent", functools.partial(os._exit, 1))
    with pytest.raises(DataError, match=r"a worker process was killed .* with fewer --workers"):
        prepare(tree, out)
