"""The text prompts: states of an object, set into photo templates (WinCLIP's ensemble, as MVFA uses it)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True)
class Prompts:
    """States of an object and the templates that they are set into, each a text with one ``{}``.

    Args:
        normal_states: States of a normal object; the published ones by default.
        abnormal_states: States of an abnormal object; the published ones by default.
        templates: Photo templates; the published ones by default.

    Raises:
        ValueError: There are no texts of a kind, or one has not exactly one ``{}``.
    """

    normal_states: Sequence[str] = NORMAL_STATES
    abnormal_states: Sequence[str] = ABNORMAL_STATES
    templates: Sequence[str] = TEMPLATES

    def __post_init__(self) -> None:
        for name, patterns in asdict(self).items():
            bad = [str(pattern) for pattern in patterns if str(pattern).count("{}") != 1]
            if bad or not patterns:
                msg = f"{name} must be a non-empty list of texts with exactly one '{{}}' each, got {bad or patterns}"
                raise ValueError(msg)

    @classmethod
    def given(cls, **patterns: Sequence[str] | None) -> "Prompts":
        """Return prompts in which what is None has its default."""
        return cls(**{name: [str(text) for text in texts] for name, texts in patterns.items() if texts is not None})

    def compose(self, class_name: str) -> tuple[list[str], list[str]]:
        """Return the normal and the abnormal prompts: every state of the object in every template, state by state."""
        normal, abnormal = (
            [template.replace("{}", state.replace("{}", class_name)) for state in states for template in self.templates]
            for states in (self.normal_states, self.abnormal_states)
        )
        return normal, abnormal
