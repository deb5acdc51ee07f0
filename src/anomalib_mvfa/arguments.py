"""The arguments that models share: their help, bounds and choices, each in one place."""

import inspect
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True)
class Argument:
    """What docstrings and ``--help`` say of an argument, its smallest and largest value, or all its values."""

    help: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


ARGUMENTS = {
    "backbone": Argument(
        "Name of an open_clip model with a plain vision transformer, ``timm/`` and the name of one of timm, or path of "
        "a model config in the JSON form of either. The environment variable ``ANOMALIB_MVFA_BACKBONE`` sets the "
        "default."
    ),
    "pretrained": Argument(
        "Tag of open_clip, path of a weight file (.pt, .safetensors, or OpenAI's own archive), or None for seeded "
        'random weights. ``ANOMALIB_MVFA_PRETRAINED`` sets the default ("null" for None).'
    ),
    "pre_trained": Argument(
        "True for published weights, the default unless the environment variable ``ANOMALIB_MVFA_PRETRAINED`` is "
        '"null"; or the path of a state dict (.pt, .pth, .safetensors); or False for seeded random weights.'
    ),
    "image_size": Argument("Height and width in pixels to which images are resized, whatever their aspect ratio."),
    "levels": Argument("Blocks (from 1) whose output is adapted or compared; the quarter points by default."),
    "class_name": Argument('Class name for prompts; the datamodule\'s by default, then "object".'),
    "quick_gelu": Argument(
        "Use QuickGELU, with which OpenAI's weights were trained, in place of GELU in both towers, as the "
        "backbones called ...-quickgelu always do. MVFA's published code does not."
    ),
    "normalize": Argument(
        "Whether images are normalised by CLIP's mean and standard deviation; for networks of timm, they always are."
    ),
    "image_score": Argument(choices=("map_max", "map_top", "det_mean", "det_max")),
    "zero_shot_weight": Argument(
        "Weight of the text branch in scores; by default 0.5, or 0 where there is no abnormal image to learn from.",
        low=0,
    ),
    "few_shot_weight": Argument(
        "Weight of the memory bank in scores; by default 0.5 in few-shot, 0 in leave-one-out.", low=0
    ),
    "calibration": Argument(
        'What sets the value ranges by which branches are scaled before they are fused: the "support" images, "none", '
        'or the whole "test" set as in the published numbers, which ``predict`` and export refuse.',
        choices=("support", "none", "test"),
    ),
    "learning_rate": Argument("Learning rate of Adam; by default 1e-3 in few-shot, 1e-4 in leave-one-out.", low=0),
    "max_epochs": Argument("Epochs to train, unless the trainer is told otherwise.", low=1),
    "bank_images": Argument(
        "Largest number of normal images in the bank where the datamodule has no support of its own.", low=1
    ),
    "coreset": Argument(
        "Share of the memory bank's rows to keep, chosen to lie far apart as in PatchCore; all by default.", 0.001, 1
    ),
    "adaptation": Argument('"adapter" or "projector" (paper, Table 4).', choices=("adapter", "projector")),
    "residual_ratio": Argument("g, the weight of an adapter in the stream (paper, Eq. 2).", 0, 0.5),
    "residual": Argument(
        '"pair" (published) or "single" (paper, Eq. 2), see :func:`~anomalib_mvfa.model.adapters.add_to_stream`.',
        choices=("pair", "single"),
    ),
    "train_levels": Argument("Levels (blocks) that have a loss and learn; all by default (paper, Table 5)."),
    "score_levels": Argument("Levels (blocks) that are scored; all by default."),
    "pooling": Argument('"mean" (published) or "max" (paper) over patches in the image loss.', choices=("mean", "max")),
    "bce": Argument(
        '"logits" (published) or "plain" (paper) cross-entropy in the image loss.', choices=("logits", "plain")
    ),
    "upsample": Argument(
        '"logits" (published) or "probabilities" (paper) are upsampled to maps.', choices=("logits", "probabilities")
    ),
    "seed": Argument("Seed of initial weights and of all random choices."),
    "threshold": Argument(
        'Image score above which an image is abnormal: "best_f1"; "sensitivity=0.95" or "specificity=0.9", at least '
        "that on the validation or support images; or a number in the scale of ``scores.csv``. By default what the "
        "checkpoint has, and best_f1 in a fit."
    ),
    "top_share": Argument(low=0, high=1),
    "boundary_share": Argument(low=0, high=0.5),
    **dict.fromkeys(("references", "coupling_blocks", "fiber_batch_size"), Argument(low=1)),
    **dict.fromkeys(("value_weight", "boundary_weight", "margin", "warmup_epochs"), Argument(low=0)),
    **dict.fromkeys(
        ("pre_processor", "post_processor", "evaluator", "visualizer"),
        Argument("Anomalib's component, or whether to use the default one."),
    ),
}

FILES = {"backbone", "pretrained", "pre_trained", "adapters"}
"""Arguments that may be paths of files."""


def check_arguments(values: Mapping[str, Any]) -> None:
    """Check arguments against their bounds and choices.

    Args:
        values: Arguments by name, such as ``locals()`` of a constructor; None and unknown names are left alone.

    Raises:
        ValueError: A value is out of bounds, or none of the choices, or both branches have no weight.
    """
    for name in ARGUMENTS.keys() & values.keys():
        value, argument = values[name], ARGUMENTS[name]
        if value is not None and argument.choices:
            check_choice(name, value, argument.choices)
        if value is not None and argument.low is not None:
            check_bounds(name, value, argument.low, argument.high)
    if values.get("zero_shot_weight") == values.get("few_shot_weight") == 0:
        msg = "zero_shot_weight and few_shot_weight are both 0; one branch at least must have weight."
        raise ValueError(msg)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        msg = f"{name}={value!r} is unknown; choose one of: {', '.join(choices)}."
        raise ValueError(msg)


def check_bounds(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raise ValueError unless the value is at least ``low`` and, where there is one, at most ``high``."""
    if not (value >= low and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        msg = f"{name}={value} must be {allowed}."
        raise ValueError(msg)


_Documented = TypeVar("_Documented", bound=Callable)


def documented(thing: _Documented) -> _Documented:
    """Complete the docstring of a class or function by the help of shared arguments that it does not describe."""
    doc = inspect.cleandoc(thing.__doc__ or "")
    constructor: Any = getattr(thing, "__init__") if isinstance(thing, type) else thing  # noqa: B009  # for mypy
    names = inspect.signature(constructor).parameters
    missing = [name for name in names if name in ARGUMENTS and f"\n    {name}: " not in doc]
    entries = "".join(f"    {name}: {ARGUMENTS[name].help}\n" for name in missing)
    before, heading, after = doc.partition("\nAttributes:\n" if "\nAttributes:\n" in doc else "\nRaises:\n")
    if "\nArgs:\n" not in before:
        before = f"{before.rstrip()}\n\nArgs:\n"
    thing.__doc__ = f"{before.rstrip()}\n{entries}{heading}{after}"
    return thing


def plain(value: Any) -> Any:  # noqa: ANN401  # whatever an argument may be
    """Return an argument in the plain types that checkpoints can be read back with: str, int, list and so on."""
    if isinstance(value, bool | float | None):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def storable(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as checkpoints keep them: in plain types, and files by paths that hold in any folder."""
    stored = {name: plain(value) for name, value in arguments.items()}
    for name in FILES & stored.keys():
        path = Path(str(stored[name])).expanduser()
        if path.is_file() and (name != "backbone" or path.suffix == ".json"):
            stored[name] = str(path.absolute())
    return stored


def differences(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, str]:
    """Return by name what is said of arguments that differ from those of a checkpoint; long values are shortened."""
    return {
        name: f"{name}={reprlib.repr(value)} (checkpoint: {reprlib.repr(saved[name])})"
        for name, value in given.items()
        if name in saved and saved[name] != value
    }


def optional_text(value: str | os.PathLike | None) -> str | None:
    """Return a value as plain text, or None, which environment variables and command lines spell as "null"."""
    return None if value is None or str(value) in {"null", "None", ""} else str(value)


DEFAULT_BACKBONE = os.environ.get("ANOMALIB_MVFA_BACKBONE", "ViT-L-14-336")
DEFAULT_PRETRAINED = optional_text(os.environ.get("ANOMALIB_MVFA_PRETRAINED", "openai"))
