"""The only place that reads YAML."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from asg_env.validation import ConfigError


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2 floats (`1e-3`) and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, which the safe loader resolves
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise ConfigError(f"the key in line {line} is a list or mapping; use text")
            if key in seen:
                raise ConfigError(f"`{key}` is repeated in line {line}; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Parse YAML text with the safe loader; `1e-3` is a number, repeated keys are refused.

    Raises:
        ConfigError: The text is not YAML, or a key is repeated.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        reason = str(getattr(error, "problem", error)).splitlines()[0]
        raise ConfigError(f"the text is not YAML{line} ({reason}); mend it") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ConfigError: The file is missing, unreadable, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a YAML file") from None
    try:
        values = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold a mapping of settings, got {type(values).__name__}; see configs/"
        )
    return values
