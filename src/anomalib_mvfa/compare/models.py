"""Builds the models of a comparison as ``anomalib train`` does, with the weights of their frozen backbones."""

import sys
from collections.abc import Mapping
from importlib import import_module
from inspect import getsourcefile, signature
from pathlib import Path
from typing import Any, NamedTuple

import anomalib.models
from anomalib.models import list_models
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from jsonargparse import ArgumentParser, Namespace

from ..baselines.base import check_layers, checked_path, fill_extractor
from ..io import file_digest
from ..plugin import register
from .config import MODEL_DEFAULT

RANDOM = "random"


class Origin(NamedTuple):
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
        model: Anomalib's mapping of a model, ``class_path`` and ``init_args``: a short name of anomalib's or ours, or
            the path of any importable class.
        weights: File with a state dict (.pt, .pth, .safetensors), which wins over the model's own argument; None for
            seeded random weights; or `MODEL_DEFAULT` for what the model loads by itself.
        defaults: Arguments that are not among ``init_args``; those that the model does not have are left out.

    Returns:
        The model, and where its weights came from.

    Raises:
        ValueError: There is no such model or argument, the model takes no weights, or the file does not fit.
        FileNotFoundError: There is no such file.
        RuntimeError: Weights could not be downloaded.
    """
    parser, config = _parsed(model, weights, defaults)
    built = parser.instantiate_classes(config).get("model") or find_model(model["class_path"])()  # without arguments
    arguments = config.get("model", Namespace())
    extractors = [module for module in built.modules() if isinstance(module, TimmFeatureExtractor)]
    for extractor in extractors:
        check_layers(extractor, arguments.get("layers") or extractor.layers)
    if weights != MODEL_DEFAULT and _takes(type(built)) == "extractor":
        if not extractors:
            raise _refused(type(built), weights)
        for extractor in extractors:
            fill_extractor(extractor, weights)
        return built, _named(weights or False)
    if "pretrained" in arguments:
        return built, _named(arguments.pretrained or False)
    if "pre_trained" in arguments and arguments.pre_trained is not True:
        return built, _named(arguments.pre_trained)
    if not extractors or not _is_anomalibs(type(built)):  # a model of the user's own may have random weights
        return built, Origin()
    config = getattr(extractors[0].feature_extractor, "pretrained_cfg", {})
    return built, Origin(".".join(filter(None, (config.get("architecture"), config.get("tag")))) or None)


def model_arguments(model: Mapping[str, Any], weights: str | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class of a model with all its arguments, those left open too, in plain values.

    Of a class that is not installed with anomalib or this package, the source file counts as well.
    """
    _, config = _parsed(model, weights, defaults)
    named = find_model(str(model["class_path"]))
    own = named.__module__.partition(".")[0] not in {"anomalib", __package__.partition(".")[0]}
    source = getsourcefile(named) if own else None
    arguments = config.get("model", Namespace()).as_dict()
    return {"class": named.__qualname__, **arguments, "source": source and file_digest(source)}


def find_model(class_path: str) -> type[AnomalibModule]:
    """Return the class of a short name of anomalib's or ours, or of an importable path.

    Raises:
        ValueError: It is no model.
    """
    register()  # of short names
    module, _, name = class_path.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where users keep models of their own, and where `python -m` looks too
    try:
        found = getattr(import_module(module or anomalib.models.__name__), name, None)
    except ImportError as error:
        msg = f"class_path={class_path!r}: {module} cannot be imported ({error}). Run from the folder that holds it."
        raise ValueError(msg) from error
    if not (isinstance(found, type) and issubclass(found, AnomalibModule)):
        names = ", ".join(sorted(list_models(case="pascal")))
        msg = f"class_path={class_path!r} is no model. Choose from {names}, or give the path of an AnomalibModule."
        raise ValueError(msg)  # noqa: TRY004  # the value of `class_path` is at fault, not its type
    return found


def _parsed(model: Mapping[str, Any], weights: str | None, defaults: Mapping[str, Any]) -> tuple[ArgumentParser, Any]:
    """Return a parser of a model's arguments, and all of them."""
    model_class = find_model(str(model.get("class_path")))
    has, given = signature(model_class).parameters, dict(model.get("init_args") or {})
    if unknown := sorted(set(given) - set(has)):
        msg = f"{model_class.__name__} has no argument {', '.join(unknown)}; it has {', '.join(has)}."
        raise ValueError(msg)
    arguments = {name: value for name, value in defaults.items() if name in has} | given
    if weights != MODEL_DEFAULT:
        if weights is not None:
            checked_path(weights)
        how = _takes(model_class)
        if how is None or given.get("pre_trained") is False:
            raise _refused(model_class, weights)
        name = how if how in has else "pre_trained"
        arguments[name] = {"pretrained": weights, "pre_trained": weights or False, "extractor": False}[how]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(model_class, "model", fail_untyped=False)
    try:
        return parser, parser.parse_object({"model": arguments})
    except Exception as error:  # argparse's, of a value of the wrong type
        msg = f"init_args={given!r} do not suit {model_class.__name__} ({' '.join(str(error).split())})."
        raise ValueError(msg) from error


def _takes(model: type[AnomalibModule]) -> str | None:
    """Return how a model takes the weights of a file: by an argument, or in its extractor; None for not at all."""
    has = signature(model).parameters
    if "pretrained" in has:
        return "pretrained" if model.__name__ != "WinClip" else None
    if "pre_trained" not in has:
        return None
    return "extractor" if _is_anomalibs(model) else "pre_trained"


def _is_anomalibs(model: type[AnomalibModule]) -> bool:
    return model.__module__.startswith("anomalib.")


def _refused(model: type[AnomalibModule], weights: str | None) -> ValueError:
    return ValueError(
        f"weights={weights!r} cannot be given to {model.__name__}, which takes its weights, if it has any, from where "
        "it downloads them to, such as the cache of Hugging Face. Take the method out of `weights`, or `pre_trained: "
        "false` out of its init_args; of WinCLIP, anomalib_mvfa.WinClipBaseline takes a file."
    )


def _named(pretrained: str | bool) -> Origin:
    if pretrained is False:
        return Origin(RANDOM, True)
    path = Path(str(pretrained)).expanduser()
    return Origin(path.name if path.is_file() else str(pretrained))
