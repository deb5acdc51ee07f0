"""MedCLIP (Wang et al., EMNLP 2022) with a memory bank: the frozen image tower, whose stages have grids of their own.

Axes: B images, N support views, P = G*G patches, D width of a stage, H = W image size.
"""

import io
import logging
import math
import re
import zipfile
from collections.abc import Sequence
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

from ..model.anomaly_map import to_grid, upsample
from ..model.lightning_mixin import CALIBRATIONS, DEFAULT_PRETRAINED, check_numbers, int_list, optional_text
from ..model.memory_bank import MemoryBank, nearest_distance
from ..model.torch_model import check_choice
from ..model.weights import RANDOM_SEED, State, fingerprint, first_line, load_state, read_state
from .clip import ClipModel, FrozenMixin

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

PUBLISHED = {
    "resnet50": "https://storage.googleapis.com/pytrial/medclip-pretrained.zip",
    "swin_tiny_patch4_window7_224": "https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip",
}
"""Where the weights are that MedCLIP's own code downloads, by timm's name of the image tower."""
MEMBER = "pytorch_model.bin"
"""Of these archives, the file with the state dict."""
STAGES = 4
MEAN, STD = 0.5862785803043838, 0.27950088968644304
"""Of MedCLIP's images, in every channel."""

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
    """A network of timm with four stages, frozen and always in eval mode.

    Args:
        backbone: Timm's name of the network.
        pretrained: A file, "imagenet", or None for random weights.
        image_size: Height and width of its input in pixels.

    Attributes:
        depth: Number of stages.
        width: D of the last one.
        joint_width: The same: there is no joint space.
        fingerprint: Of samples of the weights.

    Raises:
        ValueError: Unknown backbone or tag, or a file that does not fit the backbone.
        FileNotFoundError: The weight file does not exist.
        RuntimeError: The weights of a tag could not be had.
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
        self.width = self.joint_width = widths[-1]
        self._indices = list(range(len(widths) - STAGES, len(widths)))
        self.register_buffer("mean", torch.tensor(MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(STD), persistent=False)

    def train(self, mode: bool = True) -> "StageBackbone":
        """Stay in eval mode, whatever the mode of the model around it."""
        del mode
        return super().train(False)

    def stages(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of every stage, ``(B, P, D)``, of images ``(B, 3, H, W)``."""
        maps = self.network.forward_intermediates(
            image, indices=self._indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return [stage.flatten(2).transpose(1, 2) for stage in maps]


def _network(backbone: str, pretrained: str | None) -> nn.Module:
    if pretrained is None:
        logger.warning("pretrained=None: the backbone %s has random weights. Scores mean nothing clinically.", backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            return timm.create_model(backbone, num_classes=0)
    ways_out = (
        f"Ways out: give pretrained= the path of MedCLIP's {MEMBER} or of the archive that it comes in "
        f"({PUBLISHED.get(backbone, 'none is published for this backbone')}; it is not downloaded by itself, since its "
        "authors publish no checksum); or pretrained=imagenet for timm's weights; or pretrained=null for random ones, "
        "to try the software out."
    )
    if pretrained == "imagenet":
        try:
            return timm.create_model(backbone, pretrained=True, num_classes=0)
        except Exception as error:  # the downloaders raise whatever their transport raises
            msg = f"The weights {pretrained!r} of {backbone} could not be had ({first_line(error)}). {ways_out}"
            raise RuntimeError(msg) from error
    path = Path(pretrained).expanduser()
    if not path.is_file():
        msg = f"pretrained={pretrained!r} is no file. {ways_out}"
        looks_like_path = path.suffix or len(path.parts) > 1
        raise FileNotFoundError(msg) if looks_like_path else ValueError(msg)
    with torch.random.fork_rng(devices=[]):  # what it initialises is overwritten
        network = timm.create_model(backbone, num_classes=0)
    load_state(network, tower_state(_read(path)), backbone, pretrained)
    return network


def _read(path: Path) -> State:
    """Read a state dict, from the archive that it is published in too."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.rpartition("/")[2] == MEMBER]
            if members:
                try:
                    return torch.load(io.BytesIO(archive.read(members[0])), map_location="cpu", weights_only=True)
                except Exception as error:
                    msg = (
                        f"pretrained={str(path)!r} cannot be read ({first_line(error)}); its {MEMBER} must be a state "
                        "dict without code, and whole."
                    )
                    raise ValueError(msg) from error
    return read_state(path)


def tower_state(state: State) -> State:
    """Return an image tower's weights by timm's names, without a head.

    Args:
        state: Of all of MedCLIP, of its image tower alone, or of a network of torchvision, timm or transformers.
    """
    for tower in _TOWERS:
        if any(name.startswith(tower) for name in state):
            state = {name.removeprefix(tower): value for name, value in state.items() if name.startswith(tower)}
            break
    found = {}
    for name, value in state.items():
        if not name.startswith(_HEADS) and not name.endswith(_BUFFERS):
            for old, new in _SWIN_NAMES:
                name = name.replace(old, new)
            found[name] = value
    for name in [name for name in found if ".attn.query." in name]:
        parts = [found.pop(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        found[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if "layers.0.downsample.reduction.weight" in found:  # at the end of a stage; in timm, at the next one's beginning
        pattern = re.compile(r"^layers\.(\d+)\.downsample")
        found = {
            pattern.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample", name): value
            for name, value in found.items()
        }
    return found


class StageBank(MemoryBank):
    """Normal patches of stages that differ in grid and width.

    Buffers ``seg`` and ``det``: all stages' unit rows side by side, ``(N, sum of P * D)``.
    """

    def store(self, branch: str, tokens: Sequence[torch.Tensor]) -> None:
        """Replace a branch's rows by those of stages ``(N, P, D)``."""
        setattr(self, branch, torch.cat([normalize(stage.float(), dim=-1).flatten(1) for stage in tokens], dim=1))

    def level_distances(
        self,
        branch: str,
        tokens: Sequence[torch.Tensor],
        keep: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Every patch's distance to the bank, stage by stage, on the finest grid among the stages.

        Args:
            branch: "seg" or "det".
            tokens: Per stage, features ``(B, P, D)``.
            keep: Which support views ``(N,)`` to compare with, all by default.

        Returns:
            Per stage, distances ``(B, P)``, float32, P being that of the finest grid.

        Raises:
            RuntimeError: The branch's bank is empty.
        """
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


class MedClipModel(ClipModel):
    """Distance of a patch to those of normal images, in stages of MedCLIP's image tower.

    Args:
        backbone: See :class:`StageBackbone`, as for the next two.
        pretrained: A file, "imagenet", or None for random weights.
        image_size: Height and width of images in pixels.
        levels: Stages (from 1) whose output is compared.

    Raises:
        ValueError: A level is not a stage.
    """

    backbone: StageBackbone  # type: ignore[assignment]  # in the other's place

    def __init__(
        self,
        backbone: str = "swin_tiny_patch4_window7_224",
        pretrained: str | None = "medclip",
        image_size: int = 224,
        levels: Sequence[int] | None = (2, 3, 4),
    ) -> None:
        super().__init__(backbone, pretrained, image_size, levels, normalize=True)
        self.bank = StageBank()

    def frozen_tokens(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of stages, per level ``(B, P, D)``: there is no class token."""
        stages = self.backbone.stages(self._checked(image))
        return [stages[level - 1] for level in self.levels]

    def _new_backbone(self, backbone: str, pretrained: str | None, image_size: int, quick_gelu: bool) -> StageBackbone:
        del quick_gelu
        return StageBackbone(backbone, pretrained, image_size)


class MedClip(FrozenMixin, AnomalibModule):
    """MedCLIP's image tower as it is: nothing is trained, and images are compared with normal ones of their kind.

    Abnormal support images serve calibration and thresholds only. Images are normalised as MedCLIP's are, whatever the
    weights.

    Args:
        backbone: Timm's name of a network with four stages: "swin_tiny_patch4_window7_224" or "resnet50" for the
            published weights.
        pretrained: Path of a file: MedCLIP's pytorch_model.bin or its archive, which is not downloaded by itself, or a
            state dict of the network in the form of torchvision, timm or transformers; or "imagenet", timm's weights,
            as a stand-in; or None for seeded random weights, the default if the environment variable
            ``ANOMALIB_MVFA_PRETRAINED`` is "null".
        image_size: Height and width in pixels to which images are squashed.
        levels: Stages (from 1) whose output is compared. The first has low-level features and 3136 patches an image.
        calibration: What sets the range by which distances are scaled: the "support" images, "none", or the whole
            "test" set, which `predict` and export refuse.
        bank_images: Most normal images in the bank where the datamodule has no support of its own.
        seed: Of the draw of ``bank_images``.
        pre_processor: Anomalib's component, or whether to use the default one.
        post_processor: Anomalib's component, or whether to use the default one.
        evaluator: Anomalib's component, or whether to use the default one.
        visualizer: Anomalib's component, or whether to use the default one.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be had.
    """

    _checkpoint_key = "med_clip"
    _bank_arguments = ("levels",)

    def __init__(
        self,
        backbone: str = "swin_tiny_patch4_window7_224",
        pretrained: str | None = "medclip" if DEFAULT_PRETRAINED else None,
        image_size: int = 224,
        levels: Sequence[int] | None = (2, 3, 4),
        calibration: str = "support",
        bank_images: int = 16,
        seed: int = 0,  # noqa: ARG002  # read from the saved hyper-parameters
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Anomalib saves these locals as hyper-parameters, and reads back plain types only.
        backbone, pretrained, levels = str(backbone), optional_text(pretrained), int_list(levels)
        check_choice("calibration", calibration, CALIBRATIONS)
        check_numbers(bank_images=bank_images)
        super().__init__(self._sized(pre_processor, image_size), post_processor, evaluator, visualizer)
        self._adopt(MedClipModel(backbone, pretrained, image_size, levels))
        # Distributed training refuses a module without a weight that learns.
        self.unused = nn.Parameter(torch.zeros(1))
