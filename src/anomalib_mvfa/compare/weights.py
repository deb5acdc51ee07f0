"""Weights of frozen backbones: the only file that knows how anomalib's models come by them.

A model takes weights in one of three ways: by an argument ``pretrained``, as MVFA and the baselines here do; from
timm; or from torchvision. The latter two mostly leave no choice to whoever builds the model, so they are made to read a
file, or to draw, while it is built, and only then.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import anomalib.models
import timm
import torch
import torchvision
from anomalib.models import UnknownModelError, get_model, list_models
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor

from ..model.weights import RANDOM_SEED, State
from ..plugin import register
from .plan import MODEL_DEFAULT

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

RANDOM = "random"
ELSEWHERE = {
    "AnomalyVFM": "they are the whole model, downloaded from Hugging Face",
    "Dsr": "it downloads them itself, to anomalib's cache of pretrained weights",
    "EfficientAd": "it downloads them itself, to anomalib's cache of pretrained weights",
    "VlmAd": "it asks a language model",
    "WinClip": "it has one backbone; anomalib_mvfa.WinClipBaseline is WinCLIP with any backbone",
}
"""Models that load weights from elsewhere, and how."""

Result = TypeVar("Result")


@dataclass
class Origin:
    """Where the weights of a model's frozen backbone came from.

    Args:
        name: A file's name, a tag, or "random"; None for a model without pretrained weights.
        is_random: Whether they are random, so that scores mean nothing clinically.
    """

    name: str | None = None
    is_random: bool = False


def build_model(
    model: Mapping[str, Any],
    weights: str | None = MODEL_DEFAULT,
    **defaults: Any,  # noqa: ANN401  # arguments of any model
) -> tuple[AnomalibModule, Origin]:
    """Build a model, with the weights of its frozen backbone from a file if need be.

    Args:
        model: Anomalib's mapping of a model: ``class_path`` and ``init_args``.
        weights: File with a state dict (.pt, .pth, .safetensors), which wins over an argument ``pretrained``; None for
            seeded random weights; or `MODEL_DEFAULT` for what the model loads by itself.
        defaults: Arguments that are not among ``init_args``; those that the model does not have are left out.

    Returns:
        The model, and where its weights came from.

    Raises:
        ValueError: There is no such model or argument, the model takes no weights, or the file does not fit.
        FileNotFoundError: There is no such file.
        RuntimeError: Weights could not be downloaded.
    """
    register()  # of short names
    model_class = _model_class(model)
    has = signature(model_class).parameters
    given = dict(model.get("init_args") or {})
    if unknown := sorted(set(given) - set(has)):
        msg = f"{model_class.__name__} has no argument {', '.join(unknown)}; it has {', '.join(has)}."
        raise ValueError(msg)
    arguments = {name: value for name, value in defaults.items() if name in has} | given
    path = _checked_path(weights, model_class)
    if "pretrained" in has and weights != MODEL_DEFAULT:
        arguments["pretrained"] = None if path is None else str(path)
    with _loading(path, is_random=weights is None) as origins:
        built = _construct(str(model["class_path"]), arguments)
    if layers := arguments.get("layers", has["layers"].default if "layers" in has else None):
        _check_layers(built, layers)
    if "pretrained" in has:
        return built, _origin_of(built.hparams["pretrained"])
    if weights != MODEL_DEFAULT and not any(origin.name for origin in origins):
        msg = (
            f"weights={weights!r} was not asked for: {model_class.__name__} with {given} loads no pretrained weights. "
            "Take the method out of `weights`, or `pre_trained: false` out of its init_args."
        )
        raise ValueError(msg)
    # A model may have a frozen backbone and another network of the same kind that it trains.
    return built, next((origin for origin in origins if origin.name), Origin(RANDOM, True) if origins else Origin())


def _model_class(model: Mapping[str, Any]) -> type[AnomalibModule]:
    path = str(model.get("class_path"))
    module, _, name = path.rpartition(".")
    allowed = anomalib.models.ALLOWED_MODULES
    module = module or anomalib.models.__name__
    found = getattr(import_module(module), name, None) if module in allowed else None
    if not (isinstance(found, type) and issubclass(found, AnomalibModule)):
        names = ", ".join(sorted(list_models(case="pascal")))
        msg = f"class_path={path!r} is no model. Choose from {names}, or a class of {', '.join(sorted(allowed))}."
        raise ValueError(msg)  # noqa: TRY004  # the value of `class_path` is at fault, not its type
    return found


def _checked_path(weights: str | None, model_class: type[AnomalibModule]) -> Path | None:
    if weights == MODEL_DEFAULT:
        return None
    if model_class.__name__ in ELSEWHERE:
        msg = (
            f"weights={weights!r} cannot be given to {model_class.__name__}: {ELSEWHERE[model_class.__name__]}. Take "
            "the method out of `weights`."
        )
        raise ValueError(msg)
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if not path.is_file():
        msg = (
            f"weights={weights!r}: there is no such file. Give the path of a state dict (.pt, .pth, .safetensors), or "
            "null for random weights."
        )
        raise FileNotFoundError(msg)
    return path


def _construct(class_path: str, arguments: dict[str, Any]) -> AnomalibModule:
    try:
        # As arguments of the call, since those of the mapping must be plain and become omegaconf's lists.
        return get_model({"class_path": class_path}, **arguments)
    except UnknownModelError as error:  # hides an AttributeError of the model's own
        raise error.__cause__ or error from None


def _check_layers(model: AnomalibModule, layers: Sequence[str | int]) -> None:
    """See that anomalib has not left layers out: of those that a backbone does not have, it warns only."""
    for extractor in model.modules():
        if isinstance(extractor, TimmFeatureExtractor) and len(getattr(extractor, "idx", layers)) != len(layers):
            names = [info["module"] for info in extractor.feature_extractor.feature_info.info]
            msg = f"layers={list(layers)} are not all layers of {extractor.backbone}, which has {', '.join(names)}."
            raise ValueError(msg)


def _origin_of(pretrained: str | None) -> Origin:
    if pretrained is None:
        return Origin(RANDOM, True)
    path = Path(pretrained).expanduser()
    return Origin(path.name if path.is_file() else pretrained)


# ------------------------------------------------------------------------------------------- timm and torchvision


@contextmanager
def _loading(path: Path | None, is_random: bool) -> Iterator[list[Origin]]:
    """Have timm and torchvision read a file, or draw, where a model asks them for pretrained weights.

    Yields:
        Origins of the weights so far: one for each network that they make.
    """
    origins: list[Origin] = []
    create_model, get_state_dict = timm.create_model, torchvision.models.WeightsEnum.get_state_dict

    def create(model_name: str, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:  # noqa: ANN401
        if not timm.is_model(model_name) and ":" not in model_name:  # such as hf-hub:name
            near = get_close_matches(model_name, timm.list_models(), n=3)
            msg = f"backbone={model_name!r} is no model of timm, see timm.list_models(); the nearest names are {near}."
            raise ValueError(msg)
        if not pretrained:
            origins.append(Origin())
            return create_model(model_name, **arguments)
        if is_random:
            origins.append(Origin(RANDOM, True))
            return _seeded(lambda: create_model(model_name, **arguments))
        if path is not None:
            origins.append(Origin(path.name))
            return _timm_from_file(create_model, model_name, path, arguments)
        network: Any = _downloaded(model_name, lambda: create_model(model_name, pretrained=True, **arguments))
        config = network.pretrained_cfg
        origins.append(Origin(".".join(filter(None, (config.get("architecture", model_name), config.get("tag"))))))
        return network

    def get(entry: Any, *args: Any, **kwargs: Any) -> State:  # noqa: ANN401  # torchvision's WeightsEnum
        if is_random:
            origins.append(Origin(RANDOM, True))
            return _seeded(lambda: _torchvision_builder(entry)().state_dict())
        if path is not None:
            origins.append(Origin(path.name))
            state = _read(path)
            with _one_line(path, str(entry)), torch.random.fork_rng(devices=[]):
                _torchvision_builder(entry)().load_state_dict(state)
            return state
        origins.append(Origin(str(entry)))
        return _downloaded(str(entry), lambda: get_state_dict(entry, *args, **kwargs))

    host: Any = timm
    host.create_model, torchvision.models.WeightsEnum.get_state_dict = create, get
    try:
        yield origins
    finally:
        host.create_model, torchvision.models.WeightsEnum.get_state_dict = create_model, get_state_dict


def _timm_from_file(
    create_model: Callable[..., torch.nn.Module],
    name: str,
    path: Path,
    arguments: dict[str, Any],
) -> torch.nn.Module:
    """Create a network without its classifier, of which files may have another one or none."""
    state = _read(path)
    config = timm.get_pretrained_cfg(name)
    head = (config and config.classifier) or ()
    heads = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    overlay = {"state_dict": state, "classifier": None, "num_classes": 0}
    with _one_line(path, name), torch.random.fork_rng(devices=[]):
        # The whole network first: where only features are wanted, timm takes any file, and loads of it what fits.
        create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    arguments = {**arguments, "pretrained_cfg_overlay": overlay}
    network = create_model(name, pretrained=True, **arguments)
    for module in network.modules():
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)  # timm keeps a second copy of the weights
    return network


def _torchvision_builder(entry: Any) -> Callable[[], torch.nn.Module]:  # noqa: ANN401  # torchvision's WeightsEnum
    """Return what builds the network that torchvision's weights are of."""
    models = torchvision.models
    (name,) = (name for name in models.list_models() if models.get_model_weights(name) is type(entry))
    return lambda: models.get_model(name, weights=None)


def _seeded(build: Callable[[], Result]) -> Result:
    with torch.random.fork_rng(devices=[]):
        # Whatever the seed of a comparison; torch.manual_seed would reseed GPUs too, and for good.
        torch.default_generator.manual_seed(RANDOM_SEED)
        return build()


def _downloaded(name: str, load: Callable[[], Result]) -> Result:
    try:
        return load()
    except Exception as error:  # the downloaders raise whatever their transport raises
        msg = (
            f"The weights of {name} could not be loaded ({_short(error)}). Name a file for this method in `weights`, "
            "or null for random weights; or run once with a network."
        )
        raise RuntimeError(msg) from error


@contextmanager
def _one_line(path: Path, name: str) -> Iterator[None]:
    """Turn an error in loading, of which torch writes a page of names, into one line."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # timm's converters raise whatever a strange file makes them
        msg = (
            f"weights={str(path)!r} does not fit the backbone {name} ({_short(error)}). Name the backbone that the "
            "file was made for, in the method's init_args, or another file."
        )
        raise ValueError(msg) from None


def _read(path: Path) -> State:
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        msg = (
            f"weights={str(path)!r} cannot be read ({_short(error)}). It must be a state dict (.pt, .pth) without "
            "code, or a .safetensors file, and whole."
        )
        raise ValueError(msg) from error
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        msg = f"weights={str(path)!r} holds no state dict: a mapping from parameter names to tensors is expected."
        raise ValueError(msg)
    return state


def _short(error: Exception) -> str:
    """Return the start of what an error says; of torch's lists of parameters, without the heading."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Error(s) in loading")]
    return shorten(" ".join([f"{type(error).__name__}:", *lines]), width=150, placeholder=" ...")
