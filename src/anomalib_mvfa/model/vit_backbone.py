"""A frozen vision transformer without texts, such as DINOv2. The only file of the model that knows timm.

Axes: B images, L tokens (class token first, then register tokens if there are any), D width, G*G patches.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import Eva, VisionTransformer
from torch import nn

from ..arguments import documented
from .network import BlockNetwork, grid_of
from .weights import FLOATS, RANDOM_SEED, State, fingerprint, first_line, load_state, read_state

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

PREFIX = "timm/"
OWN_TAG = "openai"
"""Default of ``pretrained``, which for a model of timm stands for the tag in its name."""
OPTIONS = (
    "Options: give pretrained= the path of a state dict (.pt, .safetensors); or run once with a network, or with a "
    "cache of Hugging Face (HF_HOME); or pretrained=null for random weights, to try the software out."
)
HEADS = ("norm", "fc_norm", "head", "head_drop", "attn_pool")
"""Modules of timm's models behind the last block."""
TRANSFORMERS_NAMES = {
    r"^(vit|dinov2|dinov2_with_registers)\.": "",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.attention\.attention\.": ".attn.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.mlp\.weights_in\.": ".mlp.w12.",
    r"\.mlp\.weights_out\.": ".mlp.w3.",
}
"""Names of parameters in the package transformers (ViT and DINOv2), and the authors', which timm reads."""


@documented
class VitBackbone(BlockNetwork):
    """A plain vision transformer of timm, frozen and always in eval mode, in timm's own numerics.

    DINOv2 and DINOv3, with register tokens, layer scale or rotary positions, and the networks that share their form:
    RAD-DINO (radiology), UNI (pathology), RETFound (ophthalmology). Images are normalised by the model's own mean and
    standard deviation. What a size leaves over beside whole patches is cut off at the right and at the bottom, as CLIP
    does.

    Args:
        backbone: ``timm/`` and a name, or the path of a model's config.json in timm's form (architecture, model_args).
        pretrained: Path of a state dict in the form of timm, of the authors or of the package transformers; "openai",
            the default of other backbones, for the tag in the name; or None for seeded random weights.
        image_size: Height and width of its input in pixels; the position grid is resized to it as timm does.

    Raises:
        ValueError: There is no such model, it is no plain vision transformer, or the file does not fit it.
        FileNotFoundError: The config or the weight file does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """

    normalizes = True
    vit: Any  # of one of timm's classes
    rope: torch.Tensor | None
    states: torch.Tensor

    def __init__(self, backbone: str, pretrained: str | None, image_size: int) -> None:
        super().__init__()
        architecture, arguments, given = _read_config(backbone)
        state = _read_weights(backbone, pretrained)
        if any(".ls1." in key for key in state or ()) and "init_values" not in arguments:
            arguments["init_values"] = 1e-5  # layer scale, which the architecture's name may not tell (UNI)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            vit = _build(backbone, architecture, arguments, download=state is None and pretrained is not None)
        patch_size = vit.patch_embed.patch_size[0]
        self.grid = grid_of(backbone, image_size, patch_size)
        vit.set_input_size((self.grid * patch_size,) * 2)
        if state is not None:
            _load(vit, state, backbone, pretrained)
        self.vit = vit.requires_grad_(False).eval()
        self.depth, self.image_size = len(vit.blocks), image_size
        self.width = self.joint_width = vit.embed_dim
        self.registers = vit.num_prefix_tokens - 1
        self.fingerprint = fingerprint({key: value for key, value in vit.state_dict().items() if key != "pos_embed"})
        config = {**vit.pretrained_cfg, **given}
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)
        rope = getattr(vit, "rope", None)
        self.register_buffer("rope", None if rope is None else rope.get_embed(), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            self.register_buffer("states", torch.linalg.qr(torch.randn(self.width, 2))[0], persistent=False)

    def blocks(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Run blocks (from 1) after ``start`` up to ``end`` on tokens ``(B, L, D)``."""
        options = {} if self.rope is None else {"rope": self.rope}
        for block in self.vit.blocks[start:end]:
            x = block(x, **options)
        return x

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """Return the tokens ``(B, L, D)`` that enter the first block, of normalised images ``(B, 3, H, W)``."""
        size = self.grid * self.vit.patch_embed.patch_size[0]
        # In the weights' precision: under autocast, half precision stays inside of blocks, and the stream is exact.
        patches = self.vit.patch_embed(image[..., :size, :size]).to(self.vit.cls_token.dtype)
        tokens = self.vit._pos_embed(patches)  # noqa: SLF001  # timm has no public way to it
        return self.vit.norm_pre(tokens[0] if isinstance(tokens, tuple) else tokens)

    def encode_states(self, prompts: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return fixed orthogonal unit columns ``(E, 2)``, normal and abnormal, whatever the prompts."""
        del prompts
        return self.states


def is_vit(backbone: str) -> bool:
    """Whether the name of a backbone is timm's, or its config is in timm's form."""
    if backbone.startswith(PREFIX):
        return True
    try:
        return Path(backbone).suffix == ".json" and "architecture" in json.loads(Path(backbone).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _read_config(backbone: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name of timm's architecture, its arguments, and what is given of its images."""
    if backbone.startswith(PREFIX):
        return backbone.removeprefix(PREFIX), {}, {}
    config = json.loads(Path(backbone).read_text("utf-8"))
    images = {key: value for key, value in config.get("pretrained_cfg", {}).items() if key in {"mean", "std"}}
    decided_here = ("img_size", "num_classes", "dynamic_img_size", "global_pool")
    arguments = {key: value for key, value in config.get("model_args", {}).items() if key not in decided_here}
    return config["architecture"], arguments, images


def _build(backbone: str, architecture: str, arguments: Mapping[str, Any], download: bool) -> Any:  # noqa: ANN401
    """Build a model of timm as far as its last block, with the weights of its tag or with random ones."""
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(module="vision_transformer"), n=3)
        msg = (
            f"backbone={backbone!r} is unknown to timm {timm.__version__}; the nearest names are {near}. Give the path "
            "of a config.json in timm's form, or timm/NAME, such as timm/vit_small_patch14_dinov2.lvd142m."
        )
        raise ValueError(msg)
    vit: Any = None
    why = ""
    try:
        vit = timm.create_model(
            architecture, **{"pretrained": download, "num_classes": 0, "dynamic_img_size": False, **arguments}
        )
    except TypeError as error:  # of other networks, which have other options
        why = f" ({first_line(error)})"
    except Exception as error:
        if not download:
            raise
        msg = f"The weights of {backbone} could not be loaded ({first_line(error)}). {OPTIONS}"  # whatever it raises
        raise RuntimeError(msg) from error
    is_plain = isinstance(vit, VisionTransformer | Eva) and vit.cls_token is not None
    if not is_plain or getattr(vit, "rope_mixed", False):
        msg = (
            f"backbone={backbone!r} is no plain vision transformer with a class token, whose blocks can be adapted"
            f"{why}. These are, for instance: timm/vit_small_patch14_dinov2.lvd142m, timm/vit_large_patch16_224."
        )
        raise ValueError(msg)
    for name in HEADS:
        if hasattr(vit, name):
            setattr(vit, name, nn.Identity())
    return vit


def _read_weights(backbone: str, pretrained: str | None) -> State | None:
    """Return a file's state dict in whatever form; None for random weights, and for those of the name's tag."""
    if pretrained is None:
        logger.warning("pretrained=None: the backbone %s has random weights. Scores mean nothing clinically.", backbone)
        return None
    if Path(pretrained).expanduser().is_file():
        return read_state(Path(pretrained).expanduser())
    if pretrained != OWN_TAG:
        msg = f"pretrained={pretrained!r} is no file, and the tag of {backbone} belongs into its name. {OPTIONS}"
        raise FileNotFoundError(msg)
    return None


def _load(vit: Any, state: State, backbone: str, pretrained: str | None) -> None:  # noqa: ANN401
    """Load a state dict of the whole network, whose positions are resized, by timm's own rules."""
    state = {key: value.float() if value.dtype in FLOATS else value for key, value in state.items()}
    state = _from_transformers(state)
    names = {key.partition(".")[0] for key in vit.state_dict()}
    try:
        converted = sys.modules[type(vit).__module__].checkpoint_filter_fn(state, vit)
    except Exception as error:
        msg = f"The weights {pretrained!r} do not fit backbone={backbone!r} ({first_line(error)}). Name their backbone."
        raise ValueError(msg) from error
    # Heads, decoders of pre-training and the like are left out; a missing or unknown part of a block is an error.
    load_state(
        vit, {key: value for key, value in converted.items() if key.partition(".")[0] in names}, backbone, pretrained
    )


def _from_transformers(state: State) -> State:
    """Return a state dict of the package transformers in the authors' form; others as they are."""
    if not any("embeddings.patch_embeddings" in key for key in state):
        return state
    found = {}
    for key, value in state.items():
        for pattern, name in TRANSFORMERS_NAMES.items():
            key = re.sub(pattern, name, key)
        found[key] = value
    for key in [key for key in found if ".attn.query." in key]:
        parts = [found.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        found[key.replace("query", "qkv")] = torch.cat(parts)
    return found
