"""Vision transformers without texts: timm's own numerics, the forms of their weight files, and a whole run."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import timm
import torch
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine

from anomalib_mvfa import AprilGan, BMADFewShot, Clip, Mvfa, MvfaPlus, WinClipBaseline, read_image
from anomalib_mvfa.model.build import build_mvfa, load_backbone
from anomalib_mvfa.model.vit_backbone import VitBackbone
from recipe import images

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 14}
KINDS = {
    "plain": ("vit_tiny_patch16_224", {**SMALL, "img_size": 70}),
    "layer scale": ("vit_small_patch14_dinov2", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "rotary": ("vit_small_patch16_dinov3", SMALL),
}
SIZE = 60  # 4 patches, and 4 pixels that are left over


def network(kind, **options):
    """Return timm's network with weights that are not those of its constructor."""
    name, arguments = KINDS[kind]
    vit = timm.create_model(name, num_classes=0, **{**arguments, "dynamic_img_size": False, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return vit


@pytest.fixture
def config(tmp_path):
    """Return a function from the kind of a network to the path of its config in timm's form."""

    def write(kind, **images):
        name, arguments = KINDS[kind]
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"architecture": name, "model_args": arguments, "pretrained_cfg": images}))
        return str(path)

    return write


@pytest.fixture
def saved(config, tmp_path):
    """Return a function from a kind, and from how its weights are named, to its config and the file of its weights."""

    def save(kind, named=lambda state: state):
        path = tmp_path / "weights.pt"
        torch.save(named(network(kind).state_dict()), path)
        return config(kind), str(path)

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_is_timms(saved, kind):
    backbone, vit = VitBackbone(*saved(kind), SIZE), network(kind, img_size=56)
    vit.load_state_dict(sys.modules[type(vit).__module__].checkpoint_filter_fn(network(kind).state_dict(), vit))
    image = images("vit", 2, SIZE)
    expected = vit.forward_intermediates(
        image[..., :56, :56], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    found = backbone.streams(image, [1, 2, 3, 4])
    assert (backbone.depth, backbone.width, backbone.joint_width, backbone.grid) == (4, 32, 32, 4)
    assert backbone.registers == vit.num_prefix_tokens - 1 == (4 if kind in {"registers", "rotary"} else 0)
    for stream, (patches, prefix) in zip(found, expected, strict=True):
        torch.testing.assert_close(stream, torch.cat([prefix, patches], dim=1))


def of_transformers(state):
    """Name parameters as the package transformers does."""
    names = {
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "reg_token": "embeddings.register_tokens",
        "blocks.": "encoder.layer.",
        "attn.proj.": "attention.output.dense.",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "norm.": "layernorm.",
    }
    found = {"embeddings.mask_token": torch.zeros(1, 32)}
    for key, value in state.items():
        name = key
        for old, new in names.items():
            if old != "norm." or name.startswith(old):
                name = name.replace(old, new)
        if "qkv" in name:
            for part, one in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = one
        else:
            found[name] = value
    if "embeddings.register_tokens" in found:  # the authors' positions have one of the class token too
        zero = torch.zeros_like(found["embeddings.cls_token"])
        found["embeddings.position_embeddings"] = torch.cat([zero, found["embeddings.position_embeddings"]], dim=1)
    return found


def of_pretraining(state):
    """Wrap a state dict as masked autoencoders do, with a decoder and a head."""
    return {"model": {**state, "mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(8, 32)}}


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("layer scale", of_transformers),
        ("registers", of_transformers),
        ("plain", of_pretraining),
        ("plain", lambda state: {f"module.{key}": value for key, value in state.items()}),
    ],
    ids=["transformers", "transformers, registers", "pre-training", "several GPUs"],
)
def test_weights_in_other_forms_are_the_same(saved, kind, named):
    expected = VitBackbone(*saved(kind), SIZE)
    found = VitBackbone(*saved(kind, named), SIZE)
    assert found.fingerprint == expected.fingerprint
    torch.testing.assert_close(
        found.streams(images("vit", 1, SIZE), [4]), expected.streams(images("vit", 1, SIZE), [4])
    )


def test_layer_scale_that_the_name_does_not_tell_is_kept(saved, config):
    """UNI, for instance."""
    _, weights = saved("layer scale")
    found = VitBackbone(config("plain"), weights, SIZE)
    assert found.vit.blocks[0].ls1.gamma.equal(network("layer scale").blocks[0].ls1.gamma)


def test_the_fingerprint_tells_weights_apart_and_not_sizes(saved, config):
    backbone, weights = saved("registers")
    fingerprints = [VitBackbone(backbone, weights, size).fingerprint for size in (SIZE, 84)]
    assert fingerprints[0] == fingerprints[1] != VitBackbone(backbone, None, SIZE).fingerprint
    assert VitBackbone(backbone, None, SIZE).fingerprint == VitBackbone(backbone, None, 84).fingerprint


def test_images_are_normalised_by_the_models_own_mean_and_deviation(config):
    model = build_mvfa(config("plain", mean=[0.1, 0.2, 0.3], std=[0.5, 0.4, 0.3]), None, SIZE, levels=[2]).eval()
    image = images("vit", 1, SIZE)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    expected = model.backbone.streams((image - mean) / std, [2])
    torch.testing.assert_close(model.frozen_tokens(image), expected)


def test_registers_stay_in_the_stream_and_out_of_the_features(config):
    model = build_mvfa(config("registers"), None, SIZE).eval()
    tokens = model.tokens(images("vit", 1, SIZE))
    assert {part.shape for part in (*tokens.seg, *tokens.det)} == {(1, 17, 32)}
    assert {stream.shape for stream in model.frozen_tokens(images("vit", 1, SIZE))} == {(1, 21, 32)}
    whole = model.seg_adapters[0](model.frozen_tokens(images("vit", 1, SIZE))[0])
    torch.testing.assert_close(tokens.seg[0][:, 1:], whole[:, 5:])


def test_states_are_fixed_orthogonal_unit_vectors(config):
    states = [build_mvfa(config("plain"), None, size).encode_states(name) for size, name in ((56, "a"), (70, "b"))]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0].T @ states[0], torch.eye(2))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backbone": "timm/vit_smal_patch14_dinov2"}, "nearest names are .*vit_small_patch14_dinov2"),
        ({"backbone": "timm/resnet18"}, "no plain vision transformer"),
        ({"backbone": "timm/vit_base_patch16_siglip_224"}, "no plain vision transformer with a class token"),
        ({"pretrained": "laion2b"}, "pretrained='laion2b' is no file, and the tag of .* belongs into its name"),
        ({"pretrained": "weights.pt"}, "weights.pt' do not fit backbone=.*missing .*blocks"),
        ({"image_size": 13}, "image_size=13 is smaller than one patch"),
        ({"quick_gelu": True}, "quick_gelu=True is for CLIP"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_mistakes_are_named(config, tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    torch.save({"pos_embed": torch.zeros(1, 26, 32), "cls_token": torch.zeros(1, 1, 32)}, "weights.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){error}"):
        load_backbone(**{"backbone": config("plain"), "pretrained": None, "image_size": SIZE, **arguments})


def test_what_needs_texts_says_so(config):
    with pytest.raises(ValueError, match="has no texts: states and templates of prompts have no effect"):
        Mvfa(config("plain"), None, SIZE, normal_states=["fine {}"])
    with pytest.raises(ValueError, match="has no texts, which WinCLIP compares images with"):
        WinClipBaseline(backbone=config("plain"), pretrained=None)


def test_a_tag_is_looked_up_where_timm_keeps_it(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: model.cls_token.data.fill_(7))
    backbone = VitBackbone("timm/vit_tiny_patch16_224.augreg_in21k", "openai", 32)
    assert (backbone.vit.cls_token == 7).all()


@pytest.mark.parametrize("model", [Mvfa, MvfaPlus, AprilGan, Clip])
def test_a_run_a_checkpoint_and_exports(model, saved, phantom_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone, weights = saved("rotary" if model is Mvfa else "registers")
    epochs = {} if model is Clip else {"max_epochs": 1}
    trained = model(backbone, weights, SIZE, levels=[1], visualizer=False, **epochs)
    data = BMADFewShot(phantom_root, k_shot=1, train_batch_size=22, num_workers=0)
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "devices": 1}
    engine = Engine(default_root_dir=tmp_path / "results", **quiet)
    engine.train(trained, datamodule=data)
    assert getattr(trained, "warmup_epochs", 0) == (model in {Mvfa, MvfaPlus})  # as constant rates are for CLIP
    loaded = model.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    paths = sorted((phantom_root / "Brain/test/Ungood/img").iterdir())[:2]
    expected = trained.eval()(
        torch.stack([torch.from_numpy(np.array(read_image(p))).permute(2, 0, 1) / 255 for p in paths])
    )
    predicted = Engine(**quiet).predict(loaded, data_path=paths[0].parent)
    found = [[one.pred_score[0]] for one in predicted[:2]]
    if model is Mvfa and find_spec("openvino"):  # the others' graphs are parts of it
        exported = engine.export(loaded, ExportType.OPENVINO, export_root=tmp_path)
        inferencer = OpenVINOInferencer(exported, config={"INFERENCE_PRECISION_HINT": "f32"})
        for scores, path in zip(found, paths, strict=True):
            scores.append(torch.as_tensor(inferencer.predict(read_image(path)).pred_score).flatten()[0])
    for scores, score in zip(found, expected.pred_score, strict=True):
        assert [one.item() for one in scores] == pytest.approx([score.item()] * len(scores), abs=1e-4)
