"""Which digits are the new task and which the old one, and where the real ones come from."""

from typing import Any, Literal, get_args

TargetName = Literal["mnist", "scans"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)

NEW_CLASSES = (5, 6, 7, 8, 9)  # the task, unless other classes are asked for


def old_classes(new: tuple[int, ...]) -> tuple[int, ...]:
    """Return the digits that the teacher was pretrained on: all that are not new."""
    return tuple(digit for digit in range(10) if digit not in new)


def five_digits(value: Any) -> tuple[int, ...]:
    """Return five different digits in ascending order.

    Raises:
        ValueError: `value` is no list of such.
    """
    if not isinstance(value, list | tuple) or not all(type(digit) is int for digit in value):
        raise ValueError(f"must be a list of five digits, such as [0, 1, 2, 3, 4], got {value!r}")
    digits = tuple(sorted(value))
    if len(set(digits)) != 5 or len(digits) != 5 or digits[0] < 0 or digits[-1] > 9:
        raise ValueError(f"must be five different digits of 0 to 9, got {list(value)}")
    return digits
