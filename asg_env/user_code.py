"""Code of the user's own, named in settings as FILE.py:NAME."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

# The module of a file is called `asg_env.user_code.PATH`, as if this one were a package. A process
# that unpickles what the file defines, such as a worker, imports this module first and then finds
# the file by its name.
__path__: list[str] = []


class _Finder:
    """Finds the file that a module is named after."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, file = name.rpartition(".")
        if parent != __name__:
            return None
        return importlib.util.spec_from_file_location(name, unquote(file))


sys.meta_path.append(_Finder)


def is_user_code(name: str) -> bool:
    """Whether a name in the settings means something in a file of the user's."""
    return ".py:" in name


def absolute(name: str) -> str:
    """Return FILE.py:NAME with the file's whole path, so that it is found from anywhere."""
    file, _, symbol = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{symbol}"


def text_of(name: str) -> str:
    """Return the text of the file."""
    return Path(absolute(name).rpartition(":")[0]).read_text(encoding="utf-8")


def load_module(name: str) -> ModuleType:
    """Run the file, once in a process, and return its module. Whoever names a file trusts it.

    Raises:
        ValueError: There is no such file, or running it fails.
    """
    file = absolute(name).rpartition(":")[0]
    module_name = f"{__name__}.{quote(file).replace('.', '%2E')}"  # a dot would begin a submodule
    if module_name not in sys.modules and not Path(file).is_file():
        raise ValueError(f"must name an existing file, got {file}")
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"must name a file that runs, {file} ends in {type(error).__name__}: {error}"
        ) from None


def load(name: str) -> Any:
    """Run the file and return what NAME means in it.

    Raises:
        ValueError: See `load_module`; or the file does not define NAME.
    """
    module = load_module(name)
    file, _, symbol = absolute(name).rpartition(":")
    found = getattr(module, symbol, None)
    if not callable(found):
        raise ValueError(f"must name something that can be called, {file} has no such {symbol!r}")
    return found
