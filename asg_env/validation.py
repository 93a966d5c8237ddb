"""Settings models, and what is wrong with a value in one sentence."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one sentence for the person who typed it."""


class Settings(BaseModel):
    """Base of every settings model: unknown keys, coercion and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], values: Mapping[str, Any], where: str) -> M:
    """Build a settings model, or say in one sentence what is wrong.

    Args:
        model: The settings class.
        values: Field values, untrusted.
        where: Prefix of field names in messages, such as `env`; none if empty.

    Raises:
        ConfigError: The first problem, with field, value, bound and fix.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(sentence(error, model, where)) from None
    except OverflowError:
        what = f"`{where}`" if where else "a setting"
        raise ConfigError(f"{what} holds an integer too large to use; lower it") from None
    except TypeError as error:  # a key that is not a string
        what = f"`{where}`" if where else "settings"
        raise ConfigError(f"{what} must have text keys, got {list(values)}: {error}") from None


def _is_mapping(model: type[BaseModel], path: list[str]) -> bool:
    """Whether a path of two goes into a mapping, not into a union's member or another model."""
    known = model.model_fields.get(path[0]) if len(path) == 2 else None
    return known is not None and get_origin(known.annotation) is dict


def sentence(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Say the first problem in one sentence, with field, value, bound and fix."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] != "none_required"), problems[0])
    path = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    of_list = any(isinstance(part, int) for part in problem["loc"])
    if of_list or _is_mapping(model, path):  # an entry
        field = ".".join([where, *path] if where else path)
    else:
        field = ".".join([where, *path[:1]] if where else path[:1]) or where
    got = repr(problem["input"])
    context = problem.get("ctx", {})
    fix = f"; set {field} to such a value"
    match problem["type"]:
        case "too_short":
            return f"`{field}` must hold at least {context['min_length']} entry, got none{fix}"
        case "extra_forbidden" if any(isinstance(part, int) for part in problem["loc"]):
            return f"`{field}` is unknown; take it out"
        case "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            return f"`{field}` is unknown; known keys are {known}"
        case "missing":
            return f"`{field}` is missing; add it"
        case "value_error":
            message = str(context["error"])
            prefix = f"`{field}` " if path else ""
            return prefix + message + (fix if path else "")
        case "greater_than_equal":
            return f"`{field}` must be >= {context['ge']}, got {got}{fix}"
        case "greater_than":
            return f"`{field}` must be > {context['gt']}, got {got}{fix}"
        case "less_than_equal":
            return f"`{field}` must be <= {context['le']}, got {got}{fix}"
        case "less_than":
            return f"`{field}` must be < {context['lt']}, got {got}{fix}"
        case "literal_error":
            return f"`{field}` must be one of {context['expected']}, got {got}{fix}"
        case "finite_number":
            return f"`{field}` must be a finite number, got {got}{fix}"
    expected = {
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "text",
        "dict_type": "a mapping",
        "tuple_type": "a list",
        "model_type": "a mapping",
    }
    wanted = expected.get(problem["type"], problem["msg"].lower().removeprefix("input should be "))
    return f"`{field}` must be {wanted}, got {got}{fix}"
