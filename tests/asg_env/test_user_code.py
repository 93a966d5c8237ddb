import importlib
import os
import sys
from pathlib import Path

import pytest

from asg_env.user_code import absolute, is_user_code, load, load_module


@pytest.fixture
def file(tmp_path):
    """A file that notes every time it is run."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathlib import Path\n"
        "LOG = Path(__file__).with_suffix('.log')\n"
        "LOG.write_text((LOG.read_text() if LOG.exists() else '') + 'run ')\n"
        "SIZE = 3\n"
        "class Term:\n    pass\n"
        "def rule(groups, top):\n    return groups, top\n",
        encoding="utf-8",
    )
    return path


def runs(file: Path) -> int:
    return file.with_suffix(".log").read_text(encoding="utf-8").count("run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mine.py:Term", True), ("a/b.py:Term", True), ("kl", False), ("mine.py", False), ("", False)],
)
def test_is_user_code_needs_a_file_and_a_name(name, expected):
    assert is_user_code(name) is expected


def test_absolute_starts_at_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path.resolve()
    assert absolute("mine.py:Term") == f"{here}/mine.py:Term"
    assert absolute("a/../mine.py:Term") == f"{here}/mine.py:Term"


def test_absolute_leaves_a_whole_path_as_it_is_and_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = f"{tmp_path.resolve()}/mine.py:Term"
    assert absolute(whole) == whole
    assert absolute("~/mine.py:Term") == whole


def test_load_returns_what_the_name_means(file):
    assert load(f"{file}:rule")(5, 0.1) == (5, 0.1)
    assert load(f"{file}:Term").__name__ == "Term"


def test_load_runs_a_file_once_whatever_it_is_called(file, monkeypatch):
    term = load(f"{file}:Term")
    monkeypatch.chdir(file.parent)
    assert load("mine.py:Term") is term
    assert load("./mine.py:rule").__module__ == term.__module__
    assert runs(file) == 1


def test_load_keeps_files_of_the_same_name_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def name():\n    return {folder!r}\n")
    assert [load(f"{tmp_path}/{folder}/mine.py:name")() for folder in "ab"] == ["a", "b"]


@pytest.mark.parametrize("name", ["mine.py", "my.own %41 code.py", "größe/mine.py"])
def test_load_gives_what_another_process_can_unpickle(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("class Term:\n    size = 3\n", encoding="utf-8")
    term = load(f"{path}:Term")
    del sys.modules[term.__module__]  # as in a process that has not run the file
    # What a worker's unpickling does with the name that a pickle holds.
    found = getattr(importlib.import_module(term.__module__), term.__qualname__)
    assert found is not term
    assert (found.size, sys.modules[found.__module__].__file__) == (3, str(path))
    assert load(f"{path}:Term") is found
    # Unpickling imports what stands before the last dot, where the finder of files is.
    assert term.__module__.rpartition(".")[0] == load.__module__


def test_load_module_runs_the_file_once_whatever_it_is_asked_for(file):
    module = load_module(f"{file}:nothing of that name")
    assert module.SIZE == 3
    assert module.Term is load(f"{file}:Term")
    assert runs(file) == 1


def test_modules_of_other_names_are_left_to_others():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        import no_such_package  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="asg_env.no_such"):
        import asg_env.no_such  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="asg_env.user_code.no_such"):
        import asg_env.user_code.no_such  # noqa: F401


def refusal(name: str) -> str:
    with pytest.raises(ValueError, match="must name") as error:
        load(name)
    return str(error.value)


def test_load_refuses_a_file_that_is_not_there(tmp_path):
    assert refusal(f"{tmp_path}/no.py:Term") == (
        f"must name an existing file, got {tmp_path.resolve()}/no.py"
    )
    os.mkdir(tmp_path / "folder.py")
    assert refusal(f"{tmp_path}/folder.py:Term") == (
        f"must name an existing file, got {tmp_path.resolve()}/folder.py"
    )


@pytest.mark.parametrize("symbol", ["Other", "SIZE", ""])
def test_load_refuses_a_name_that_is_nothing_to_call(file, symbol):
    assert refusal(f"{file}:{symbol}") == (
        f"must name something that can be called, {file.resolve()} has no such {symbol!r}"
    )


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_package_at_all\n", "ModuleNotFoundError: No module named 'no_such_"),
        ("def (:\n", "SyntaxError: "),
    ],
)
def test_load_refuses_a_file_that_does_not_run_and_takes_it_once_mended(file, text, ending):
    good = file.read_text(encoding="utf-8")
    file.write_text(text, encoding="utf-8")
    assert refusal(f"{file}:Term").startswith(
        f"must name a file that runs, {file.resolve()} ends in {ending}"
    )
    # Another size, so that no bytecode of the broken file is taken for it.
    file.write_text(good, encoding="utf-8")
    assert load(f"{file}:Term").__name__ == "Term"
