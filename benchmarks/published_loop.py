"""Training and testing as the published code does both, in plain torch: what our speed is compared with.

One image at a time; every weight of the backbone has a gradient, which no optimiser reads; half precision by autocast;
the test compares an image with the whole bank at once and copies the maps of every level to the host. Attention
weights, which no loss reads, are not computed here: that is to the advantage of this loop.

Axes: B = 1 image, L tokens (class token first), P = G*G patches, D width, E joint width, M rows of the bank, l level.
"""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, normalize

RATIO, TEMPERATURE, SMOOTHING = 0.1, 100, 1e-5


class Block(nn.Module):
    """A block of the image tower: attention and a perceptron, each behind a layer norm and beside the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens ``(B, L, D)``."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class PublishedModel(nn.Module):
    """The image tower of CLIP with an adapter of each branch after every quarter of its blocks.

    Args:
        config: Model config in open_clip's form.
        image_size: Height and width of images in pixels.
    """

    def __init__(self, config: dict[str, Any], image_size: int) -> None:
        super().__init__()
        vision, joint = config["vision_cfg"], config["embed_dim"]
        width, depth, patch = vision["width"], vision["layers"], vision["patch_size"]
        self.levels = [depth * quarter // 4 for quarter in (1, 2, 3, 4)]
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image_size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, width // vision.get("head_width", 64)) for _ in range(depth))
        self.seg_adapters, self.det_adapters = (
            nn.ModuleList(
                nn.ModuleDict({"fc1": _adapter_layer(width, joint), "fc2": _adapter_layer(joint, width)})
                for _ in self.levels
            )
            for _ in range(2)
        )

    def load_ours(self, state: dict[str, torch.Tensor]) -> None:
        """Copy the weights of our model's state dict."""
        visual = "backbone.clip.visual."
        names = {name: name.removeprefix(visual).replace("transformer.resblocks", "blocks") for name in state}
        own = self.state_dict()
        self.load_state_dict({names[name]: value for name, value in state.items() if names[name] in own})

    def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return features of both branches, per level ``(P, E)``, of one image ``(1, 3, H, W)``."""
        patches = self.conv1(image).flatten(2).transpose(1, 2)  # (1, P, D)
        x = self.ln_pre(torch.cat([self.class_embedding.expand(1, 1, -1), patches], 1) + self.positional_embedding)
        seg_features, det_features = [], []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number in self.levels:
                seg_adapter: Any = self.seg_adapters[len(seg_features)]
                det_adapter: Any = self.det_adapters[len(seg_features)]
                seg, det = seg_adapter["fc1"](x), det_adapter["fc1"](x)
                x = (1 - 2 * RATIO) * x + RATIO * seg_adapter["fc2"](seg) + RATIO * det_adapter["fc2"](det)
                seg_features.append(seg[0, 1:])
                det_features.append(det[0, 1:])
        return seg_features, det_features


def _adapter_layer(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.LeakyReLU())


class PublishedLoop:
    """The published training and testing of one image.

    Args:
        model: The model, all of whose weights get gradients.
        text_features: Unit columns ``(E, 2)``, normal and abnormal.
        dtype: Precision of autocast; float32 switches it off.
    """

    def __init__(self, model: PublishedModel, text_features: torch.Tensor, dtype: torch.dtype = torch.float16) -> None:
        self.model = model.eval()
        self.text_features = text_features
        self.autocast = torch.autocast(text_features.device.type, dtype, enabled=dtype != torch.float32)
        self.optimizers = [
            torch.optim.Adam(adapters.parameters(), lr=1e-3, betas=(0.5, 0.999))
            for adapters in (model.seg_adapters, model.det_adapters)
        ]

    def train(self, image: torch.Tensor, mask: torch.Tensor, label: torch.Tensor) -> float:
        """Make a step on an image ``(1, 3, H, W)`` with its mask ``(1, H, W)`` and label ``(1,)``; return the loss."""
        mask = mask.float()
        with self.autocast:
            seg_features, det_features = self.model(image)
            loss = torch.zeros((), device=image.device)
            for features in det_features:
                score = self._logits(features).softmax(dim=-1)[:, 1].mean()
                loss = loss + binary_cross_entropy_with_logits(score.view(1), label.to(score.dtype))
            for features in seg_features:
                maps = self._map(self._logits(features), mask.shape[-1]).softmax(dim=1)  # (1, 2, H, W)
                loss = loss + _focal_loss(maps, mask) + _dice_loss(maps[:, 1], mask)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    @torch.no_grad()
    def test(self, image: torch.Tensor, bank: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the zero-shot and few-shot map ``(H, W)``, means over levels, of an image and a bank ``(l, M, E)``."""
        size = image.shape[-1]
        zero, few = [], []
        with self.autocast:
            seg_features, _ = self.model(image)
            for features, rows in zip(seg_features, bank, strict=True):
                maps = self._map(self._logits(features), size).softmax(dim=1)
                zero.append(maps[0, 1].float().cpu().numpy())
                cosine = normalize(rows, dim=-1) @ normalize(features, dim=-1).T  # (M, P)
                distance = (1 - cosine).amin(dim=0)
                few.append(self._map(distance.unsqueeze(-1), size)[0, 0].float().cpu().numpy())
        return np.mean(zero, axis=0), np.mean(few, axis=0)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        """Scaled cosines ``(P, 2)`` of features ``(P, E)`` with both text features."""
        return TEMPERATURE * normalize(features, dim=-1) @ self.text_features

    @staticmethod
    def _map(patches: torch.Tensor, size: int) -> torch.Tensor:
        """Lay values ``(P, C)`` out as a map, and upsample it to ``(1, C, H, W)``."""
        side = math.isqrt(len(patches))
        grid = patches.T.reshape(1, -1, side, side)
        return interpolate(grid, (size, size), mode="bilinear", align_corners=True)


def _focal_loss(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    target = torch.stack([1 - mask, mask], dim=1).clamp(SMOOTHING, 1 - SMOOTHING)
    right = (target * maps).sum(dim=1) + SMOOTHING
    return -((1 - right) ** 2 * right.log()).mean()


def _dice_loss(abnormal: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return 1 - (2 * (abnormal * mask).sum() + 1) / (abnormal.sum() + mask.sum() + 1)
