"""MedClip: stages of a network against loops by hand, and every form that its weights come in."""

import zipfile

import pytest
import timm
import torch
from torch.nn.functional import interpolate, normalize

from anomalib_mvfa import MedClip
from anomalib_mvfa.baselines.med_clip import _SWIN_NAMES, MEAN, STD, tower_state
from anomalib_mvfa.model.calibration import fill_bank
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.torch_model import Scoring

SWIN = "swin_tiny_patch4_window7_224"
SIZE = 56


@pytest.fixture(scope="module")
def model():
    return MedClip("resnet18", None, SIZE, visualizer=False).model


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
    bank = stages_of(model, torch.cat([pictures["normal"], pictures["normal"].flip(-1)]))
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
    other = MedClip("resnet18", None, 2 * SIZE, visualizer=False).model
    assert other.backbone.fingerprint == model.backbone.fingerprint


def transformers_form(state):
    """A Swin's state dict under the names of transformers, as in MedCLIP's file."""
    found = {}
    for name, value in state.items():
        if name.startswith("head."):
            continue
        for level in range(1, 4):  # timm has it at a stage's beginning, transformers at the end of the one before
            if name.startswith(f"layers.{level}.downsample"):
                name = name.replace(f"layers.{level}", f"layers.{level - 1}")
                break
        names = [name]
        values = [value]
        if ".qkv." in name:
            names = [name.replace(".qkv.", f".self.{part}.") for part in ("query", "key", "value")]
            values = list(value.chunk(3))
        elif "relative_position_bias_table" in name:
            names = [name.replace(".attn.", ".attn.self.")]
        for one, part in zip(names, values, strict=True):
            one = one.replace(".attn.self.", ".attention.self.").replace(".attn.proj.", ".attention.output.dense.")
            for there, here in _SWIN_NAMES:
                if here not in {".attn.", ".attn.proj."} and not (here == "norm." and ".norm" in one):
                    one = one.replace(here, there) if here != "layers." or one.startswith("layers.") else one
            found[f"vision_model.model.{one}"] = part.clone()
    return found


def test_medclips_resnet_comes_in_the_form_of_torchvision(tmp_path, model):
    source = timm.create_model("resnet18", num_classes=5)
    state = {f"vision_model.model.{name}": value for name, value in source.state_dict().items()}
    state |= {"text_model.projection_head.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "medclip.zip", "w") as archive:
        archive.write(tmp_path / "pytorch_model.bin", "pytorch_model.bin")
    for name in ("pytorch_model.bin", "medclip.zip"):
        loaded = MedClip("resnet18", str(tmp_path / name), SIZE, visualizer=False).model.backbone
        assert torch.equal(loaded.network.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
        assert loaded.fingerprint != model.backbone.fingerprint


def test_names_of_transformers_become_timms():
    state = timm.create_model(SWIN).state_dict()
    renamed = tower_state(transformers_form(state))
    wanted = {name: value for name, value in state.items() if not name.startswith("head.")}
    assert set(renamed) == set(wanted)
    assert all(torch.equal(renamed[name], wanted[name]) for name in wanted)


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
        MedClip(**{"backbone": "resnet18", "pretrained": None, "image_size": SIZE, "visualizer": False, **arguments})
