"""MedCLIP (Wang et al., EMNLP 2022) with a memory bank: the frozen image tower, whose stages have grids of their own.

Axes: B images, N support views, P = G*G patches, D width of a stage, H = W image size.
"""

import io
import logging
import math
import re
import zipfile
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn
from torch.nn.functional import normalize

from ..arguments import DEFAULT_PRETRAINED, check_arguments, documented, optional_text
from ..model.anomaly_map import to_grid, upsample
from ..model.build import check_levels
from ..model.memory_bank import MemoryBank, nearest_distance
from ..model.weights import RANDOM_SEED, State, fingerprint, first_line, load_state, read_state
from .base import drawn_from
from .clip import FrozenMixin, FrozenModel

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

PUBLISHED = {  # where MedCLIP's own code downloads weights from, by timm's name of the image tower
    "resnet50": "https://storage.googleapis.com/pytrial/medclip-pretrained.zip",
    "swin_tiny_patch4_window7_224": "https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip",
}
MEMBER = "pytorch_model.bin"  # file with the state dict in these archives
STAGES = 4
MEAN, STD = 0.5862785803043838, 0.27950088968644304  # of MedCLIP's images, in every channel

_TOWERS = ("vision_model.model.", "model.", "swin.")  # what precedes the image tower's names, in any form
_HEADS = ("projection_head.", "fc.", "head.", "classifier.")
_BUFFERS = ("relative_position_index", "attn_mask")  # which timm computes
_SWIN_NAMES = (  # of transformers and of timm, in this order
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("encoder.layers.", "layers."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.self.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
)


class StageBackbone(nn.Module):
    """A frozen network of timm with four stages, for :class:`~anomalib_mvfa.model.torch_model.MvfaModel`.

    Its arguments and errors are those of :class:`MedClip`.

    Attributes:
        depth: Number of stages.
        width: D of the last one.
        joint_width: The same: there is no joint space.
        fingerprint: Hash of samples of the weights.
    """

    network: Any  # of one of timm's classes
    mean: torch.Tensor
    std: torch.Tensor
    depth = STAGES

    def __init__(self, backbone: str, pretrained: str | None, image_size: int) -> None:
        super().__init__()
        if not timm.is_model(backbone):
            near = get_close_matches(backbone, timm.list_models(), n=3)
            msg = f"backbone={backbone!r} is no model of timm, see timm.list_models(); the nearest names are {near}."
            raise ValueError(msg)
        network: Any = _network(backbone, pretrained)
        widths = [stage["num_chs"] for stage in getattr(network, "feature_info", ())]
        if len(widths) < STAGES or not hasattr(network, "forward_intermediates"):
            msg = f"backbone={backbone!r} has no {STAGES} stages; {', '.join(PUBLISHED)} are the ones of MedCLIP."
            raise ValueError(msg)
        self.fingerprint = fingerprint(network.state_dict())
        if hasattr(network, "set_input_size"):  # of networks with windows
            network.set_input_size((image_size, image_size))
        self.network = network.requires_grad_(False).eval()
        self.image_size = image_size
        self.width = self.joint_width = widths[-1]
        self._first = len(widths) - STAGES
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def streams(self, image: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
        """Return the output ``(B, P, D)`` of these stages (from 1), of normalised images ``(B, 3, H, W)``."""
        indices = [self._first + end - 1 for end in ends]
        maps = self.network.forward_intermediates(
            image, indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return [stage.flatten(2).transpose(1, 2) for stage in maps]


def _network(backbone: str, pretrained: str | None) -> nn.Module:
    options = (
        f"Options: give pretrained= the path of MedCLIP's {MEMBER} or of the archive that it comes in "
        f"({PUBLISHED.get(backbone, 'none is published for this backbone')}; it is not downloaded by itself, since its "
        "authors publish no checksum); or pretrained=imagenet for timm's weights; or pretrained=null for random ones, "
        "to try the software out."
    )
    path = Path(pretrained or "").expanduser()
    if pretrained == "imagenet":
        try:
            return timm.create_model(backbone, pretrained=True, num_classes=0)
        except Exception as error:  # the downloaders raise whatever their transport raises
            msg = f"The weights {pretrained!r} of {backbone} could not be loaded ({first_line(error)}). {options}"
            raise RuntimeError(msg) from error
    if pretrained is not None and not path.is_file():
        msg = f"pretrained={pretrained!r} is no file. {options}"
        looks_like_path = path.suffix or len(path.parts) > 1
        raise FileNotFoundError(msg) if looks_like_path else ValueError(msg)
    with drawn_from(RANDOM_SEED):
        network = timm.create_model(backbone, num_classes=0)
    if pretrained is None:
        logger.warning("pretrained=None: the backbone %s has random weights. Scores mean nothing clinically.", backbone)
    else:
        load_state(network, tower_state(_read(path)), backbone, pretrained)
    return network


def _read(path: Path) -> State:
    """Read a state dict, from the archive that it is published in too."""
    members = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [archive.read(name) for name in archive.namelist() if name.rpartition("/")[2] == MEMBER]
    if not members:
        return read_state(path)
    try:
        return torch.load(io.BytesIO(members[0]), map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"pretrained={str(path)!r} cannot be read ({first_line(error)}); its {MEMBER} must be a state dict without "
            "code, and complete."
        )
        raise ValueError(msg) from error


def tower_state(state: State) -> State:
    """Return an image tower's weights by timm's names, without a head.

    They are taken from all of MedCLIP, its image tower alone, or a network of torchvision, timm or transformers.
    """
    tower = next((prefix for prefix in _TOWERS if any(name.startswith(prefix) for name in state)), "")
    found = {}
    for name, value in state.items():
        own = name.removeprefix(tower)
        if not name.startswith(tower) or own.startswith(_HEADS) or own.endswith(_BUFFERS):
            continue
        for old, new in _SWIN_NAMES:
            own = own.replace(old, new)
        found[own] = value
    for name in [name for name in found if ".attn.query." in name]:
        parts = [found.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        found[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if "layers.0.downsample.reduction.weight" in found:  # at the end of a stage; in timm, at the next one's beginning
        stage = re.compile(r"(?<=^layers\.)\d+(?=\.downsample)")
        found = {stage.sub(lambda match: str(int(match[0]) + 1), name): value for name, value in found.items()}
    return found


class StageBank(MemoryBank):
    """Normal patches of stages that differ in grid and width.

    Buffers ``seg`` and ``det``: all stages' unit rows side by side, ``(N, sum of P * D)``.
    """

    def store(self, branch: str, tokens: Iterable[torch.Tensor]) -> None:
        """Replace a branch's rows by those of stages ``(N, P, D)``."""
        setattr(self, branch, torch.cat([normalize(stage.float(), dim=-1).flatten(1) for stage in tokens], dim=1))

    def level_distances(
        self,
        branch: str,
        tokens: Sequence[torch.Tensor],
        keep: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """As :meth:`MemoryBank.level_distances`, of stages ``(B, P, D)``: on the finest grid among them."""
        bank = self._rows(branch)
        if keep is not None:
            bank = bank[keep]
        grid = max(math.isqrt(stage.shape[1]) for stage in tokens)
        distances = []
        stages = bank.split([stage.shape[1] * stage.shape[2] for stage in tokens], dim=1)
        for query, rows in zip(tokens, stages, strict=True):
            distance = nearest_distance(query, rows.unflatten(1, query.shape[1:]).flatten(0, 1))  # (B, P)
            distances.append(upsample(to_grid(distance.unsqueeze(-1)), grid).flatten(1))
        return distances


@documented
class MedClip(FrozenMixin, AnomalibModule):
    """MedCLIP's image tower as it is: nothing is trained, and images are compared with normal ones of their kind.

    Abnormal support images serve calibration and thresholds only. Images are normalised as MedCLIP's are, whatever the
    weights.

    Args:
        backbone: Timm's name of a network with four stages: "swin_tiny_patch4_window7_224" or "resnet50" for the
            published weights.
        pretrained: Path of a file: MedCLIP's pytorch_model.bin or its archive, which is not downloaded by itself, or a
            state dict of the network in the form of torchvision, timm or transformers; or "imagenet", timm's weights,
            in their place; or None for seeded random weights, the default if the environment variable
            ``ANOMALIB_MVFA_PRETRAINED`` is "null".
        levels: Stages (from 1) whose output is compared. The first has low-level features and 3136 patches an image.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """

    IMAGE_SIZE = 224
    checkpoint_key = "med_clip"

    def __init__(
        self,
        backbone: str = "swin_tiny_patch4_window7_224",
        pretrained: str | None = "medclip" if DEFAULT_PRETRAINED else None,
        image_size: int = IMAGE_SIZE,
        levels: Sequence[int] | None = (2, 3, 4),
        calibration: str = "support",
        bank_images: int = 16,
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        backbone, pretrained = str(backbone), optional_text(pretrained)
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer)
        tower = StageBackbone(backbone, pretrained, image_size)
        model = FrozenModel(tower, StageBank(), check_levels(levels, STAGES), normalize=True)
        self._init_frozen(model, calibration, seed, bank_images)
