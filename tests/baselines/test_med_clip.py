"""MedClip: stages of a network against loops by hand, and every form that its weights come in."""

import zipfile

import pytest
import timm
import torch
from torch.nn.functional import interpolate, normalize

from anomalib_mvfa import MedClip
from anomalib_mvfa.baselines.med_clip import MEAN, STD, tower_state
from anomalib_mvfa.model.calibration import fill_bank
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.torch_model import Scoring

RESNET = "test_resnet"
SIZE = 56


@pytest.fixture(scope="module")
def model():
    return MedClip(RESNET, None, SIZE, visualizer=False).model


def stages_of(model, image):
    """Stages ``(B, P, D)`` by the network's own layers."""
    net = model.backbone.network
    x = net.maxpool(net.act1(net.bn1(net.conv1((image - MEAN) / STD))))
    found = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        found.append(x.flatten(2).transpose(1, 2))
    return found[1:]  # levels 2 to 4


@torch.no_grad()
def test_distances_are_means_over_stages_on_the_finest_grid(model, views, pictures):
    model.scoring = Scoring("seg", "map_max", Weights(0.0, 1.0), normalised=False)
    fill_bank(model, views)
    bank = stages_of(model, pictures["bank"])
    maps = []
    for query, rows in zip(stages_of(model, pictures["query"]), bank, strict=True):
        cosine = normalize(query, dim=-1) @ normalize(rows.flatten(0, 1), dim=-1).T
        side = int(query.shape[1] ** 0.5)
        maps.append(
            interpolate((1 - cosine.amax(-1)).view(-1, 1, side, side), (7, 7), mode="bilinear", align_corners=True)
        )
    mean = torch.stack(maps).mean(dim=0)
    expected = interpolate(mean, (SIZE, SIZE), mode="bilinear", align_corners=True)[:, 0] / 2
    found = model(pictures["query"])
    assert (found.anomaly_map - expected).abs().max() < 1e-5
    assert (found.pred_score - expected.amax(dim=(1, 2))).abs().max() < 1e-5
    assert model(pictures["normal"]).anomaly_map.max() < 1e-5  # its own rows


def test_nothing_learns_and_random_weights_are_a_function_of_the_name(model):
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.train().backbone.training
    other = MedClip(RESNET, None, 2 * SIZE, visualizer=False).model
    assert other.backbone.fingerprint == model.backbone.fingerprint


def test_medclips_resnet_comes_in_the_form_of_torchvision(tmp_path, model):
    source = timm.create_model(RESNET, num_classes=5)
    state = {f"vision_model.model.{name}": value for name, value in source.state_dict().items()}
    state |= {"text_model.projection_head.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "medclip.zip", "w") as archive:
        archive.write(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    for name in ("pytorch_model.bin", "medclip.zip"):
        loaded = MedClip(RESNET, str(tmp_path / name), SIZE, visualizer=False).model.backbone
        assert torch.equal(loaded.network.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
        assert loaded.fingerprint != model.backbone.fingerprint


def test_names_of_transformers_become_timms():
    block, ours = "encoder.layers.2.blocks.1.", "layers.2.blocks.1."
    names = {
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "embeddings.norm.bias": "patch_embed.norm.bias",
        f"{block}layernorm_before.bias": f"{ours}norm1.bias",
        f"{block}attention.self.relative_position_bias_table": f"{ours}attn.relative_position_bias_table",
        f"{block}attention.output.dense.bias": f"{ours}attn.proj.bias",
        f"{block}layernorm_after.bias": f"{ours}norm2.bias",
        f"{block}intermediate.dense.bias": f"{ours}mlp.fc1.bias",
        f"{block}output.dense.bias": f"{ours}mlp.fc2.bias",
        "encoder.layers.0.downsample.norm.bias": "layers.1.downsample.norm.bias",
        "layernorm.bias": "norm.bias",
    }
    values = {f"vision_model.model.{name}": torch.full([2], row) for row, name in enumerate(names)}
    parts = {name: torch.full([2], 20 + row) for row, name in enumerate(("query", "key", "value"))}
    values |= {f"vision_model.model.{block}attention.self.{name}.bias": part for name, part in parts.items()}
    values |= {f"vision_model.model.{block}attention.self.relative_position_index": torch.zeros(2)}
    found = {name: value.tolist() for name, value in tower_state(values).items()}
    expected = {name: [row, row] for row, name in enumerate(names.values())}
    assert found == {**expected, f"{ours}attn.qkv.bias": [20, 20, 21, 21, 22, 22]}
    with torch.device("meta"):
        assert set(found) <= set(timm.create_model("swin_tiny_patch4_window7_224").state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone": "resnet19"}, ValueError, "is no model of timm"),
        ({"pretrained": "nowhere.pt"}, FileNotFoundError, "nowhere.pt"),
        ({"levels": [0]}, ValueError, "levels"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        MedClip(**{"backbone": RESNET, "pretrained": None, "image_size": SIZE, "visualizer": False, **arguments})
