"""The text prompts: states of an object, set into photo templates (WinCLIP's ensemble, as MVFA uses it)."""

from collections.abc import Sequence

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL_STATES = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
TEMPLATES = (
    "a bad photo of a {}.",
    "a low resolution photo of the {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a bright photo of a {}.",
    "a dark photo of the {}.",
    "a photo of my {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "a low resolution photo of a {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a photo of the small {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "a dark photo of a {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)


def check_slots(name: str, patterns: Sequence[str]) -> list[str]:
    """Return the patterns as a plain list, each with one ``{}`` for the object.

    Args:
        name: What the patterns are, for the error.
        patterns: States or templates.

    Raises:
        ValueError: The list is empty, or a pattern has not exactly one ``{}``.
    """
    checked = [str(pattern) for pattern in patterns]
    bad = [pattern for pattern in checked if pattern.count("{}") != 1]
    if bad or not checked:
        msg = f"{name} must be a non-empty list of texts with exactly one '{{}}' each, got {bad or checked}"
        raise ValueError(msg)
    return checked


def compose(class_name: str, states: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return every state of the object in every template, state by state."""
    named = [state.replace("{}", class_name) for state in states]
    return [template.replace("{}", state) for state in named for template in templates]
