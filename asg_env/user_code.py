"""Code of the user's own, named in settings as FILE.py:NAME."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


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


def load(name: str) -> Any:
    """Run the file and return what NAME means in it. Whoever names a file trusts it.

    Raises:
        ValueError: There is no such file, running it fails, or it does not define NAME.
    """
    file, _, symbol = absolute(name).rpartition(":")
    # One module a file: what it defines can then be sent to worker processes.
    module_name = f"asg_user_{hashlib.sha256(file.encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        if not Path(file).is_file():
            raise ValueError(f"must name an existing file, got {file}")
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(
                f"must name a file that runs, {file} ends in {type(error).__name__}: {error}"
            ) from None
    found = getattr(sys.modules[module_name], symbol, None)
    if not callable(found):
        raise ValueError(f"must name something that can be called, {file} has no such {symbol!r}")
    return found
