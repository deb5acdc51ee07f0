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
from ..model.network import FrozenNetwork
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


class StageBackbone(FrozenNetwork):
    """A frozen network of timm with four stages; its arguments and errors are those of :class:`MedClip`."""

    network: Any  # of one of timm's classes
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
        self.width = self.joint_width = widths[-1]  # there is no joint space
        self._first = len(widths) - STAGES
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def streams(self, image: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
        """Return the output ``(B, P, D)`` of these stages (from 1), of normalised images ``(B, 3, H, W)``."""
        indices = [self._first + end - 1 for end in ends]
        maps = self.network.forward_intermediates(image, indices=indices, output_fmt="NCHW", intermediates_only=True)
        return [stage.flatten(2).transpose(1, 2) for stage in maps]


def _network(backbone: str, pretrained: str | None) -> nn.Module:
    options = (
        f"Options: MedCLIP's {MEMBER} or its archive ({PUBLISHED.get(backbone, 'none for this backbone')}; not "
        "downloaded by itself, since its authors publish no checksum); imagenet for timm's weights; or null for random "
        "ones, to try the software out."
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
        raise FileNotFoundError(msg) if path.suffix or len(path.parts) > 1 else ValueError(msg)
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
        msg = f"pretrained={str(path)!r} cannot be read ({first_line(error)}); its {MEMBER} must be a state dict."
        raise ValueError(msg) from error


def tower_state(state: State) -> State:
    """Return weights of MedCLIP, its image tower, or a network of torchvision, timm or transformers as timm's tower."""
    tower = next((prefix for prefix in _TOWERS if any(name.startswith(prefix) for name in state)), "")
    state = {name.removeprefix(tower): value for name, value in state.items() if name.startswith(tower)}
    for old, new in _SWIN_NAMES:
        state = {name.replace(old, new): value for name, value in state.items()}
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        state[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if any(name.startswith("layers.0.downsample.") for name in state):  # timm has it in the stage that follows
        stage = re.compile(r"(?<=^layers\.)\d+(?=\.downsample)")
        state = {stage.sub(lambda match: str(int(match[0]) + 1), name): value for name, value in state.items()}
    return {name: value for name, value in state.items() if not name.startswith(_HEADS) and not name.endswith(_BUFFERS)}


class StageBank(MemoryBank):
    """Normal patches of stages that differ in grid and width.

    Buffers ``seg`` and ``det``: all stages' unit rows side by side, ``(N, sum of P * D)``.
    """

    def store(self, branch: str, tokens: Iterable[torch.Tensor]) -> None:
        """Replace a branch's rows by those of stages ``(N, P, D)``."""
        setattr(self, branch, torch.cat([normalize(stage.float(), dim=-1).flatten(1) for stage in tokens], dim=1))

    def level_distances(
        self, branch: str, tokens: Sequence[torch.Tensor], keep: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """As :meth:`MemoryBank.level_distances`, of stages ``(B, P, D)``: on the finest grid among them."""
        bank = self._rows(branch) if keep is None else self._rows(branch)[keep]
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

    Abnormal support images serve calibration and thresholds only. Images are normalised as MedCLIP's, whatever the
    weights. Errors are those of :class:`~anomalib_mvfa.model.lightning_model.Mvfa`.

    Args:
        backbone: Timm's name of a network with four stages: "swin_tiny_patch4_window7_224" or "resnet50" for the
            published weights.
        pretrained: Path of MedCLIP's pytorch_model.bin or its archive, which is not downloaded by itself, or of a state
            dict of the network (torchvision, timm, transformers); "imagenet" for timm's weights; or None for seeded
            random weights, the default if the environment variable ``ANOMALIB_MVFA_PRETRAINED`` is "null".
        levels: Stages (from 1) whose output is compared. The first has low-level features and 3136 patches an image.
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
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        backbone, pretrained = str(backbone), optional_text(pretrained)
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        tower = StageBackbone(backbone, pretrained, image_size)
        model = FrozenModel(tower, StageBank(), check_levels(levels, STAGES), normalize=True)
        self._init_frozen(model, calibration, seed, bank_images)
