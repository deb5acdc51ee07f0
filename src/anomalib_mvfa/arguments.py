"""The arguments that models and datamodules share: their bounds, choices and help texts, in one place."""

from collections.abc import Sequence


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        msg = f"{name}={value!r} is unknown. Choose one of: {', '.join(choices)}."
        raise ValueError(msg)


def check_bounds(name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Raise ValueError for a value below ``low`` or above ``high``; None is not checked."""
    if value is not None and not (low <= value and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        msg = f"{name}={value} must be {bounds}."
        raise ValueError(msg)
