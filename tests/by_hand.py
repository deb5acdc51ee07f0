"""MVFA once more, in plain tensor operations and double precision: what the unit tests compare with.

Nothing here is shared with the package; a decision that is wrong in both would have to be made twice.

Axes: B images, L tokens (class token first), P = G*G patches, D width, E joint width, H = W image size, l level.
"""

import math

import torch
from torch.nn.functional import leaky_relu, softmax, unfold

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, of the three channels."""

Weights = dict[str, torch.Tensor]


def weights_of(module: torch.nn.Module) -> Weights:
    return {name: value.detach().double() for name, value in module.state_dict().items()}


# ---------------------------------------------------------------------- CLIP


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def layer_norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(x: torch.Tensor, w: Weights, name: str, heads: int, activation=gelu, causal: bool = False) -> torch.Tensor:
    """Run a pre-norm transformer block on ``(B, L, D)``."""
    batch, length, width = x.shape
    qkv = layer_norm(x, w, f"{name}.ln_1") @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
    q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.split(width, dim=-1))
    affinity = q @ k.transpose(-1, -2) / math.sqrt(width / heads)
    if causal:
        affinity = affinity + torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
    mixed = (softmax(affinity, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + mixed @ w[f"{name}.attn.out_proj.weight"].T + w[f"{name}.attn.out_proj.bias"]
    hidden = activation(layer_norm(x, w, f"{name}.ln_2") @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"])
    return x + hidden @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]


def embed(image: torch.Tensor, w: Weights, side: int) -> torch.Tensor:
    """Tokens ``(B, L, D)`` that enter the first block; pixels that fill no patch are left out."""
    kernel = w["visual.conv1.weight"].flatten(1)  # (D, 3 * side * side)
    patches = unfold(image, side, stride=side).transpose(1, 2) @ kernel.T
    first = w["visual.class_embedding"].expand(len(image), 1, -1)
    return layer_norm(torch.cat([first, patches], dim=1) + w["visual.positional_embedding"], w, "visual.ln_pre")


def text_embedding(ids: torch.Tensor, w: Weights, heads: int, activation=gelu) -> torch.Tensor:
    """Unit embeddings ``(prompts, E)`` of token numbers; the end of a text has the largest number."""
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    depth = len({name.split(".")[2] for name in w if name.startswith("transformer.resblocks.")})
    for index in range(depth):
        x = block(x, w, f"transformer.resblocks.{index}", heads, activation, causal=True)
    x = layer_norm(x, w, "ln_final")[torch.arange(len(ids)), ids.argmax(dim=1)]
    return unit(x @ w["text_projection"])


# ---------------------------------------------------------------------- MVFA


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def tokens(
    model: torch.nn.Module,
    image: torch.Tensor,
    ratio: float = 0.1,
    residual: str = "pair",
    adaptation: str = "adapter",
    activation=gelu,
    normalize: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features ``(B, L, E)`` per level of the seg and the det branch, from the weights of a model."""
    clip = weights_of(model.backbone.clip)
    seg, det = weights_of(model.seg_adapters), weights_of(model.det_adapters)
    image = image.double().clip(0, 1)
    if normalize:
        image = (image - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]
    side = clip["visual.conv1.weight"].shape[-1]
    x = embed(image, clip, side)
    heads = x.shape[-1] // 64
    features = {"seg": [], "det": []}
    for number in range(1, model.levels[-1] + 1):
        x = block(x, clip, f"visual.transformer.resblocks.{number - 1}", heads, activation)
        if number not in model.levels:
            continue
        position = model.levels.index(number)
        back = []
        for branch, w in (("seg", seg), ("det", det)):
            feature = x @ w[f"{position}.fc1.0.weight"].T
            if adaptation == "adapter":
                feature = leaky_relu(feature, 0.01)
                back.append(leaky_relu(feature @ w[f"{position}.fc2.0.weight"].T, 0.01))
            features[branch].append(feature)
        if adaptation == "adapter":
            keep, share = {"pair": (1 - 2 * ratio, ratio), "single": (1 - ratio, ratio / 2)}[residual]
            x = keep * x + share * back[0] + share * back[1]
    return features["seg"], features["det"]


def logits(feature: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Patch logits ``(B, P, 2)`` of tokens ``(B, L, E)``."""
    return 100 * unit(feature.double()[:, 1:]) @ text.double()


def enlarge(grid: torch.Tensor, size: int) -> torch.Tensor:
    """Resize ``(..., G, G)`` to ``(..., size, size)``, bilinear, corner on corner."""
    side = grid.shape[-1]
    at = torch.arange(size).double() * (side - 1) / (size - 1)
    hat = (1 - (at[:, None] - torch.arange(side)[None]).abs()).clip(min=0)  # (size, G)
    return hat @ grid.double() @ hat.T


def seg_map(patch_logits: torch.Tensor, size: int, upsample: str = "logits") -> torch.Tensor:
    """Abnormal probability ``(B, H, W)`` of patch logits ``(B, P, 2)``."""
    side = math.isqrt(patch_logits.shape[1])
    grid = patch_logits.transpose(1, 2).reshape(-1, 2, side, side)
    if upsample == "probabilities":
        return enlarge(softmax(grid, dim=1), size)[:, 1]
    return softmax(enlarge(grid, size), dim=1)[:, 1]


def det_probability(feature: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Abnormal probability ``(B, P)`` of tokens ``(B, L, E)``."""
    return softmax(logits(feature, text), dim=-1)[..., 1]


def distances(query: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Distance ``(B, P)`` of tokens ``(B, L, E)`` to the nearest of the tokens ``(N, L, E)``, class tokens of N too."""
    rows = unit(bank.double()).flatten(0, 1)
    return torch.stack([(1 - unit(one.double()[1:]) @ rows.T).min(dim=1).values for one in query])


def few_map(queries: list[torch.Tensor], banks: list[torch.Tensor], size: int) -> torch.Tensor:
    """Few-shot map ``(B, H, W)``: of distances averaged over levels."""
    mean = sum(distances(query, bank) for query, bank in zip(queries, banks, strict=True)) / len(banks)
    side = math.isqrt(mean.shape[1])
    return enlarge(mean.reshape(-1, side, side), size)


def fused(zero: float, few: float, weights: tuple[float, float], ranges) -> float:
    """Score of one pair of values with the ranges ``((low, high), (low, high))``, or None for the paper's Eq. 6."""
    if ranges is None:
        return (weights[0] * zero + weights[1] * few) / (weights[0] + 2 * weights[1])
    scaled = [(value - low) / (high - low) for value, (low, high) in zip((zero, few), ranges, strict=True)]
    u = (weights[0] * scaled[0] + weights[1] * scaled[1]) / sum(weights)
    v = 2 * u - 1
    return 0.5 + 0.5 * v / (1 + abs(v))
