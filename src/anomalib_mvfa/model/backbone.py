"""The frozen CLIP. The only file that knows open_clip.

Axes: B images, L tokens (class token first), P = G*G patches, D width of the image tower, E joint width.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from ..arguments import documented
from ..io import save_atomically
from ..progress import progress
from .linear import linear
from .network import BlockNetwork, grid_of
from .weights import FLOATS, RANDOM_SEED, State, checked_download, fingerprint, first_line, load_state, read_state

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

TEXT_BATCH = 64

_NOT_PARAMETERS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives


@documented
class ClipBackbone(BlockNetwork):
    """CLIP with a plain vision transformer, frozen and always in eval mode.

    Args:
        image_size: Height and width of its input in pixels; the position grid is resized to it (bicubic, antialiased).

    Raises:
        ValueError: Unknown backbone, tag or image size, an image tower other than a plain vision transformer, or a
            file that does not fit the backbone.
        FileNotFoundError: The config or the weight file does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """

    has_texts = True
    clip: Any  # open_clip ships no types

    def __init__(self, backbone: str, pretrained: str | None, image_size: int, quick_gelu: bool = False) -> None:
        super().__init__()
        config = _read_config(backbone)
        quick_gelu = quick_gelu or bool(config.get("quick_gelu"))  # as the models called "...-quickgelu" have it
        self.grid = grid_of(backbone, image_size, config["vision_cfg"]["patch_size"])
        state = _read_weights(backbone, pretrained, config, quick_gelu)
        try:
            with torch.random.fork_rng(devices=[]):  # what it initialises is overwritten
                clip: Any = _build(config, quick_gelu, image_size)
        except TypeError as error:
            msg = f"backbone={backbone!r} is not a model config that open_clip understands ({error})."
            raise ValueError(msg) from error
        _load(clip, state, backbone, pretrained)

        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = _tokenizer(backbone, config["text_cfg"])
        self._text_config = config["text_cfg"]
        self.depth = len(clip.visual.transformer.resblocks)
        self.width: int = clip.visual.class_embedding.shape[0]
        self.joint_width = config["embed_dim"]
        self.image_size = image_size
        self.fingerprint = _fingerprint(clip, quick_gelu)
        # open_clip 2.24 runs its blocks sequence-first, from 2.26 on batch-first.
        self._batch_first = getattr(clip.visual.transformer, "batch_first", False)
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1), persistent=False)

    def blocks(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Run blocks (from 1) after ``start`` up to ``end`` on tokens ``(B, L, D)``."""
        for index in range(start, end):
            x = self.block(index, x)
        return x

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``(B, L, D)`` that enter the first block, of images ``(B, 3, H, W)``."""
        tower = self.clip.visual
        patches = tower.conv1(image).flatten(2).transpose(1, 2)  # (B, P, D)
        class_token = tower.class_embedding.expand(patches.shape[0], 1, -1)
        # In the weights' precision: under autocast, half precision stays inside of blocks, and the stream is exact.
        tokens = torch.cat([class_token, patches.to(class_token.dtype)], dim=1) + tower.positional_embedding
        return tower.ln_pre(tokens)

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Run block ``index`` (from 0) on tokens ``(B, L, D)``."""
        block = self.clip.visual.transformer.resblocks[index]
        if type(block) is ResidualAttentionBlock:  # written out, for the sake of its products
            x = x + block.ls_1(_attention(block.attn, block.ln_1(x)))
            hidden = block.mlp.gelu(_layer(block.mlp.c_fc, block.ln_2(x)))  # (B, L, 4D)
            return x + block.ls_2(_layer(block.mlp.c_proj, hidden))
        if self._batch_first:
            return block(x)
        return block(x.transpose(0, 1)).transpose(0, 1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return unit text features ``(len(prompts), E)``, float32."""
        device = self.clip.logit_scale.device
        with torch.autocast(device.type, enabled=False):
            features = [
                self.clip.encode_text(self.tokenizer(list(prompts[start : start + TEXT_BATCH])).to(device))
                for start in progress(range(0, len(prompts), TEXT_BATCH), "Encoding prompts")
            ]
        return normalize(torch.cat(features).float(), dim=-1)

    def encode_states(self, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return text features ``(E, 2)`` of prompts for each state: unit means of unit embeddings.

        They are kept on disk, below :func:`torch.hub.get_dir`, for the same network, prompts and kind of device: a CPU
        takes minutes for those of ViT-L.
        """
        device = self.clip.logit_scale.device
        text = [self._text_config, version("open_clip_torch"), [list(texts) for texts in prompts]]
        made_of = [self.fingerprint, device.type, *text]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        path = Path(torch.hub.get_dir()) / "anomalib_mvfa" / f"{key}.pt"
        with suppress(Exception):  # there is none, or it cannot be read
            return torch.load(path, map_location=device, weights_only=True)
        states = [normalize(self.encode_text(texts).mean(dim=0), dim=0) for texts in prompts]
        features = torch.stack(states, dim=1)
        with suppress(OSError):  # it is for speed alone
            save_atomically(features, path)
        return features


def _layer(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


def _attention(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of tokens ``(B, L, D)``."""
    qkv = linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (B, L, 3D)
    # (B, heads, L, D / heads) each
    query, key, value = (part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
    mixed = scaled_dot_product_attention(query, key, value)
    return _layer(attention.out_proj, mixed.transpose(1, 2).flatten(2))


def working_backbones() -> list[str]:
    """Return the names of open_clip's models that MVFA can adapt."""
    return [name for name in open_clip.list_models() if _is_plain(open_clip.get_model_config(name))]


def _is_plain(config: dict[str, Any]) -> bool:
    """Whether a config describes a vision and a text transformer of open_clip's own.

    Image towers of timm and ResNets are none, nor are CoCa's text tower and those of Hugging Face.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    is_vit = "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int)
    return is_vit and "multimodal_cfg" not in config and "hf_model_name" not in text


def _read_config(backbone: str) -> dict[str, Any]:
    path = Path(backbone)
    if path.suffix == ".json":
        if not path.is_file():
            msg = f"backbone={backbone!r}: there is no such model config. Give the path of an existing .json file."
            raise FileNotFoundError(msg)
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            msg = f"backbone={backbone!r} is no JSON file ({error})."
            raise ValueError(msg) from error
        config = config.get("model_cfg", config) if isinstance(config, dict) else {}
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
        if missing:
            msg = f"backbone={backbone!r} is not a model config in open_clip's form: {sorted(missing)} missing."
            raise ValueError(msg)
    else:
        config = open_clip.get_model_config(backbone) if backbone in open_clip.list_models() else None
        if config is None:
            msg = (
                f"backbone={backbone!r} is unknown. Give the path of a model config (.json) or one of: "
                f"{', '.join(working_backbones())}."
            )
            raise ValueError(msg)
    if not _is_plain(config):
        msg = (
            f"backbone={backbone!r} has no plain vision transformer as its image tower, whose blocks MVFA adapts, or "
            f"takes its text tower from another package. These work: {', '.join(working_backbones())}."
        )
        raise ValueError(msg)
    config["vision_cfg"] = {"patch_size": 16, "image_size": 224, **config["vision_cfg"]}  # open_clip's own defaults
    return config


def _build(config: dict[str, Any], quick_gelu: bool, image_size: int) -> nn.Module:
    arguments = {key: value for key, value in config.items() if key not in {"custom_text", "quick_gelu"}}
    arguments["vision_cfg"] = {**config["vision_cfg"], "image_size": image_size, "patch_dropout": 0.0}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    clip = kind(**arguments, quick_gelu=quick_gelu)
    if not isinstance(clip.visual, VisionTransformer):
        msg = f"The image tower is a {type(clip.visual).__name__}; these work: {', '.join(working_backbones())}."
        raise ValueError(msg)  # noqa: TRY004  # the value of `backbone` is at fault, not its type
    return clip


def _tokenizer(backbone: str, text: dict[str, Any]) -> Any:  # noqa: ANN401  # open_clip has no common type
    if "hf_tokenizer_name" in text:
        return open_clip.get_tokenizer(backbone)
    return _simple_tokenizer(text.get("context_length", 77))


@cache  # it takes 0.2 seconds to make, and has no state
def _simple_tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=context_length)


def _read_weights(backbone: str, pretrained: str | None, config: dict[str, Any], quick_gelu: bool) -> State:
    if pretrained is None:
        logger.warning("pretrained=None: the backbone %s has random weights. Scores mean nothing clinically.", backbone)
        # Drawn at the config's own image size, like pretrained weights, so that they do not depend on `image_size`.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return _build(config, quick_gelu, config["vision_cfg"]["image_size"]).state_dict()
    path = Path(pretrained).expanduser()
    if path.is_file():
        return _read_file(path)
    tags = open_clip.list_pretrained_tags_by_model(backbone)
    options = (
        "Options: give pretrained= (or the environment variable ANOMALIB_MVFA_PRETRAINED) the path of a weight file, "
        "in OpenAI's or open_clip's form (.pt, .safetensors); or run once with a network; or "
        "pretrained=null for random weights, to try the software out."
    )
    if pretrained not in tags:
        msg = (
            f"pretrained={pretrained!r} is neither a file nor a tag of {backbone} (its tags: "
            f"{', '.join(tags) or 'none'}). {options}"
        )
        looks_like_path = path.suffix or len(path.parts) > 1
        raise FileNotFoundError(msg) if looks_like_path else ValueError(msg)
    try:
        config = open_clip.get_pretrained_cfg(backbone, pretrained)
        return _read_file(checked_download(Path(open_clip.download_pretrained(config))))
    except Exception as error:  # the downloaders raise whatever their transport raises
        msg = f"The weights {pretrained!r} of {backbone} could not be loaded ({first_line(error)}). {options}"
        raise RuntimeError(msg) from error


def _read_file(path: Path) -> State:
    """Read a state dict, without what OpenAI's archives hold beside parameters."""
    return {key: value for key, value in read_state(path, _openai_digests()).items() if key not in _NOT_PARAMETERS}


def _openai_digests() -> set[str]:
    """Return the SHA-256 of OpenAI's TorchScript archives, which their published addresses contain."""
    addresses = [open_clip.get_pretrained_cfg(name, "openai")["url"] for name in open_clip.list_openai_models()]
    return {digest for address in addresses for digest in re.findall("/([0-9a-f]{64})/", address)}


def _load(clip: nn.Module, state: State, backbone: str, pretrained: str | None) -> None:
    state = {key: value.float() if value.dtype in FLOATS else value for key, value in state.items()}  # to be resized
    with suppress(RuntimeError, AssertionError):  # positions of no square grid, or of another width
        resize_pos_embed(state, clip)
        resize_text_pos_embed(state, clip)
    load_state(clip, state, backbone, pretrained)


def _fingerprint(clip: nn.Module, quick_gelu: bool) -> str:
    """Hash the weights but for the position grid, which depends on the image size."""
    state = {name: weight for name, weight in clip.state_dict().items() if name != "visual.positional_embedding"}
    return fingerprint(state, f"quick_gelu={quick_gelu}")
