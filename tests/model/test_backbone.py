"""The frozen CLIP: its numbers against formulas by hand, its files in every form, and every error.

Axes: B images, L tokens (class token first), P = G*G patches, D width of the image tower.
"""

import json
import logging

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import by_hand
from anomalib_mvfa.io import file_digest
from anomalib_mvfa.model import backbone as module
from anomalib_mvfa.model.backbone import ClipBackbone, working_backbones
from recipe import SIDE, TINY, clip_weights, images, write_config

SIZE = TINY.config["vision_cfg"]["image_size"]
POSITIONS = "visual.positional_embedding"


@pytest.fixture(scope="module")
def weights():
    """A state dict that fits ``tiny_config``, of numbers that half precision holds exactly."""
    return {name: value.half().float() for name, value in clip_weights(TINY).items()}


@pytest.fixture
def file(weights, tmp_path):
    torch.save(weights, tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


@pytest.fixture
def build(tiny_config, file):
    """Build a backbone from a weight file, at 42 px (G = 3)."""

    def _build(pretrained=file, image_size=SIZE, quick_gelu=False, config=tiny_config) -> ClipBackbone:
        return ClipBackbone(str(config), None if pretrained is None else str(pretrained), image_size, quick_gelu)

    return _build


def with_vision(tmp_path, **changes):
    """Write a config whose image tower differs from the tiny one's."""
    vision = {**TINY.config["vision_cfg"], **changes}
    return write_config(tmp_path / "changed.json", TINY._replace(config={**TINY.config, "vision_cfg": vision}))


# ---------------------------------------------------------------------- numbers


@torch.no_grad()
@pytest.mark.parametrize("quick", [False, True])
def test_image_tower(build, weights, quick):
    backbone = build(quick_gelu=quick)
    w = {name: value.double() for name, value in weights.items()}
    x, expected = backbone.embed(images("tower", 2, SIZE)), by_hand.embed(images("tower", 2, SIZE).double(), w, SIDE)
    assert x.shape == (2, 10, 128)
    assert (x - expected).abs().max() < 1e-5
    for index in range(backbone.depth):
        x = backbone.block(index, x)
        name, activation = f"visual.transformer.resblocks.{index}", by_hand.quick_gelu if quick else by_hand.gelu
        expected = by_hand.block(expected, w, name, 2, activation)
        assert (x - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_config_that_asks_for_quick_gelu_gets_it(build, tiny_config, tmp_path):
    path = tmp_path / "quick.json"
    path.write_text(json.dumps({**json.loads(tiny_config.read_text()), "quick_gelu": True}))
    assert build(config=path).fingerprint == build(quick_gelu=True).fingerprint != build().fingerprint


@pytest.mark.parametrize("quick", [False, True])
def test_text_tower(build, weights, quick):
    backbone = build(quick_gelu=quick)
    prompts = ["a photo of a liver.", "", "damaged " * 100]  # the last is cut at 77 tokens
    ids, activation = backbone.tokenizer(prompts), by_hand.quick_gelu if quick else by_hand.gelu
    expected = by_hand.text_embedding(ids, {n: v.double() for n, v in weights.items()}, 2, activation)
    found = backbone.encode_text(prompts)
    assert found.shape == (3, 24)
    assert (found - expected).abs().max() < 1e-5


def test_text_is_encoded_alike_in_batches_and_in_half_precision(build, monkeypatch):
    backbone = build()
    prompts = [f"photo number {number}" for number in range(7)]
    whole = backbone.encode_text(prompts)
    monkeypatch.setattr(module, "TEXT_BATCH", 3)
    assert torch.allclose(backbone.encode_text(prompts), whole, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = backbone.encode_text(prompts)
    assert half.dtype == torch.float32
    assert torch.allclose(half, whole, atol=1e-6)


@torch.no_grad()
def test_patches_are_numbered_row_by_row(build):
    """Token 1 + r G + c sees rows 14 r to 14 r + 13 and columns 14 c to 14 c + 13, and no other pixel."""
    backbone = build()
    plain = images("plain", 1, SIZE)
    before = backbone.embed(plain)[0]
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 2), (2, 1)):
        for y, x in ((0, 0), (0, 13), (13, 0), (13, 13)):
            changed = plain.clone()
            changed[0, :, SIDE * row + y, SIDE * column + x] += 1.0
            moved = (backbone.embed(changed)[0] - before).abs().amax(dim=1) > 0
            assert moved.nonzero().flatten().tolist() == [1 + 3 * row + column]


@pytest.mark.parametrize("image_size", [28, SIZE, 70])
def test_position_grid_is_resized(build, weights, image_size):
    """The class token is the first; at the config's image size every token has the file's position."""
    backbone, grid = build(image_size=image_size), image_size // SIDE
    positions = weights["visual.positional_embedding"]
    square = positions[1:].T.reshape(1, 128, 3, 3)
    resized = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    found = backbone.clip.visual.positional_embedding
    assert found.shape == (1 + grid * grid, 128)
    assert torch.equal(found[0], positions[0])
    assert torch.allclose(found[1:], positions[1:] if image_size == SIZE else resized[0].flatten(1).T, atol=1e-6)
    assert backbone.grid == grid


@torch.no_grad()
@pytest.mark.parametrize("image_size", [43, 55])
def test_pixels_that_fill_no_patch_are_left_out(build, image_size):
    backbone, image = build(image_size=image_size), images("odd", 1, image_size)
    assert backbone.grid == 3
    assert torch.equal(backbone.embed(image), build().embed(image[..., :SIZE, :SIZE]))


def test_it_is_frozen_and_stays_in_eval_mode(build, tmp_path):
    backbone = build(config=with_vision(tmp_path, patch_dropout=0.5)).train()
    assert (backbone.depth, backbone.width, backbone.joint_width, backbone.grid) == (4, 128, 24, 3)
    assert not any(part.training for part in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert torch.equal(backbone.embed(images("a", 1, SIZE)), backbone.embed(images("a", 1, SIZE)))


# ---------------------------------------------------------------------- random weights


def test_random_weights_are_seeded_warned_of_and_the_same_at_any_image_size(build, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        one = build(pretrained=None).state_dict()
    assert "random weights" in caplog.text
    torch.manual_seed(1)
    for size, differing in ((SIZE, []), (70, [f"clip.{POSITIONS}"])):
        other = build(pretrained=None, image_size=size).state_dict()
        assert [name for name, value in one.items() if not torch.equal(value, other[name])] == differing


# ---------------------------------------------------------------------- fingerprint


def test_fingerprint_is_that_of_the_weights(build, weights, tmp_path):
    """Any other weight gives another, the image size and the file do not."""
    fingerprint = build().fingerprint
    assert fingerprint == build(image_size=70).fingerprint
    save_file(weights, tmp_path / "clip.safetensors")
    assert fingerprint == build(tmp_path / "clip.safetensors").fingerprint
    others = {build(pretrained=None).fingerprint, build(quick_gelu=True).fingerprint}
    for name in ("visual.class_embedding", "visual.transformer.resblocks.3.mlp.c_fc.weight", "token_embedding.weight"):
        torch.save({**weights, name: weights[name] * 1.001}, tmp_path / "other.pt")
        others.add(build(tmp_path / "other.pt").fingerprint)
    assert len(others - {fingerprint}) == 5


# ---------------------------------------------------------------------- weight files


class Archive(torch.nn.Module):
    """What OpenAI's archives are: CLIP, traced, with three numbers beside its parameters."""

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(1))

    def forward(self, image):
        return self.visual(image) * self.logit_scale


def write_archive(weights, path):
    clip = open_clip.CLIP(**TINY.config).eval()
    clip.load_state_dict(weights)
    with torch.no_grad():
        archive = torch.jit.trace(Archive(clip), images("trace", 1, SIZE), check_trace=False)
    torch.jit.save(archive, str(path))


def as_module(weights):
    return {f"module.{name}": value for name, value in weights.items()}


def as_half(weights):
    return {name: value.half() for name, value in weights.items()}


FORMS = {
    "clip.pt": torch.save,
    "distributed.pt": lambda weights, path: torch.save(as_module(weights), path),
    "checkpoint.pt": lambda weights, path: torch.save({"state_dict": as_module(weights), "epoch": 3}, path),
    "numbers.pt": lambda weights, path: torch.save({**weights, "context_length": torch.tensor(77)}, path),
    "clip.safetensors": save_file,
    "half.safetensors": lambda weights, path: save_file(as_half(weights), path),
    "archive.pt": write_archive,
}


@pytest.mark.parametrize("name", FORMS)
def test_weights_of_every_form(build, weights, tmp_path, name, monkeypatch):
    expected = build()
    FORMS[name](weights, tmp_path / name)
    monkeypatch.setattr(module, "_openai_digests", lambda: {file_digest(str(tmp_path / name))})
    found = build(tmp_path / name)
    for key, value in found.clip.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights[key]), key
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_weights_at_another_image_size(build, weights, tmp_path, kind):
    rounded = {name: value.to(kind) for name, value in weights.items()}
    torch.save(rounded, tmp_path / "half.pt")
    torch.save({name: value.float() for name, value in rounded.items()}, tmp_path / "float.pt")
    half, single = (build(tmp_path / name, image_size=70).clip.state_dict() for name in ("half.pt", "float.pt"))
    assert all(torch.equal(value, single[name]) for name, value in half.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: (10 * value).to(torch.int8), "have values of int8 in .*; float16, bfloat16, float32 or"),
        (lambda value: value.to_sparse(), "have values of float32, not all of them stored, in"),
        (lambda value: value.double() * 1e200, "have values that are not finite"),
    ],
    ids=["int8", "sparse", "overflow"],
)
def test_values_of_another_kind(build, weights, tmp_path, damage, message):
    torch.save({**weights, "ln_final.weight": damage(weights["ln_final.weight"])}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=rf"odd\.pt' {message}"):
        build(tmp_path / "odd.pt")


def test_other_ways_to_name_the_same(build, file, tmp_path, monkeypatch):
    """A home folder in a path, a config that is wrapped as on the hub, and a tag, whose file open_clip downloads."""
    monkeypatch.setenv("HOME", str(file.parent))
    (tmp_path / "hub.json").write_text(json.dumps({"model_cfg": TINY.config, "preprocess_cfg": {}}))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["tag"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"url": f"{name}/{tag}"})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(file))
    monkeypatch.setattr(module, "_openai_digests", set)
    for found in (build("~/clip.pt"), build(config=tmp_path / "hub.json"), build("tag")):
        assert found.fingerprint == build().fingerprint


# ---------------------------------------------------------------------- errors


def test_unknown_name(build):
    with pytest.raises(ValueError, match=r"'ViT-XXL' is unknown\. .*path of a model config \(\.json\).*ViT-L-14-336"):
        build(config="ViT-XXL")


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "convnext_base"])
def test_other_image_towers(build, name):
    with pytest.raises(ValueError, match=f"{name}' has no plain vision transformer.*These work: .*ViT-L-14-336"):
        build(config=name)
    assert name not in working_backbones()


def test_missing_config_and_one_of_another_form(build, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json': there is no such model config"):
        build(config=tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text(json.dumps({"hidden_size": 7, "text_cfg": {}}))
    with pytest.raises(ValueError, match=r"other\.json' is not a model config.*\['embed_dim', 'vision_cfg'\] missing"):
        build(config=tmp_path / "other.json")


@pytest.mark.parametrize("image_size", [0, 13])
def test_image_smaller_than_a_patch(build, image_size):
    with pytest.raises(ValueError, match=f"image_size={image_size} is smaller than one patch.*at least 14"):
        build(image_size=image_size)


OPTIONS = r"Options: give pretrained=.*weight file.*or run once with a network; or pretrained=null"


@pytest.mark.parametrize("name", ["nothing.pt", "nothing.safetensors", "folder/nothing"])
def test_missing_file(build, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"nothing.*is neither a file nor a tag.*none.*{OPTIONS}"):
        build(tmp_path / name)


def test_unknown_tag_and_no_network(monkeypatch):
    message = rf"'opnai' is neither a file nor a tag of ViT-B-32 \(its tags: .*openai.*{OPTIONS}"
    with pytest.raises(ValueError, match=message):
        ClipBackbone("ViT-B-32", "opnai", 224)

    def fail(*_, **__):
        msg = "Name or service not known\nand a long story"
        raise ConnectionError(msg)

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    message = rf"'openai' of ViT-B-32 could not be loaded \(ConnectionError: .*known\)\. {OPTIONS}"
    with pytest.raises(RuntimeError, match=message):
        ClipBackbone("ViT-B-32", "openai", 224)


@pytest.mark.parametrize(("name", "kept"), [("clip.pt", 0.0), ("clip.pt", 0.5), ("clip.safetensors", 0.5)])
def test_corrupt_file(build, weights, tmp_path, name, kept):
    path = tmp_path / f"cut-{name}"
    (save_file if name.endswith("safetensors") else torch.save)(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    message = rf"cut-{name}' cannot be read \(.*\)\. It must be a state dict.*compare its size"
    with pytest.raises(ValueError, match=message):
        build(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": 7}], ids=str)
def test_file_without_a_state_dict(build, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt' holds no state dict: a mapping from parameter names"):
        build(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        ("visual.proj", {}, r"1 parameters missing \['visual\.proj'\], 0 unknown \[\], 0 of another shape \[\]"),
        (None, {"head": (1,)}, r"0 parameters missing \[\], 1 unknown \['head'\], 0 of another shape \[\]"),
        (None, {"visual.proj": (1,)}, r"0 parameters missing \[\], 0 unknown \[\], 1 of another shape \['visual\.pro"),
        (None, {POSITIONS: (12, 128)}, r"1 of another shape \['visual\.positional_embedding'\]"),  # of no square grid
        (POSITIONS, {}, r"1 parameters missing \['visual\.positional_embedding'\]"),
        (None, {"visual.conv1.weight": (128, 3, 7, 7)}, r"1 of another shape \['visual\.conv1\.weight'\]"),
        (None, {"positional_embedding": (77, 64)}, r"1 of another shape \['positional_embedding'\]"),
    ],
)
def test_file_of_another_backbone(build, weights, tmp_path, dropped, added, message):
    other = {name: value for name, value in weights.items() if name != dropped}
    torch.save({**other, **{name: torch.zeros(shape) for name, shape in added.items()}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf"other\.pt' do not fit backbone=.*{message}.*Name the backbone"):
        build(tmp_path / "other.pt")


# ---------------------------------------------------------------------- text features on disk


def test_prompts_are_encoded_once(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encode, calls = ClipBackbone.encode_text, []
    monkeypatch.setattr(ClipBackbone, "encode_text", lambda self, texts: calls.append(texts) or encode(self, texts))
    prompts = [["a liver", "a fine liver"], ["a damaged liver"]]
    first = ClipBackbone(str(tiny_config), None, 56).encode_states(prompts)
    assert torch.equal(ClipBackbone(str(tiny_config), None, 70).encode_states(prompts), first)
    assert calls == prompts

    (kept,) = tmp_path.rglob("*.pt")
    kept.write_bytes(kept.read_bytes()[:100])  # as of a run that was killed
    assert torch.equal(ClipBackbone(str(tiny_config), None, 56).encode_states(prompts), first)
    assert calls == prompts * 2
    other = [["a liver", "a fine liver"], ["an odd liver"]]
    assert not torch.equal(ClipBackbone(str(tiny_config), None, 56).encode_states(other), first)


def test_text_features_of_another_network_are_others(tiny_config, mini_clip):
    prompts = [["a liver"], ["a damaged liver"]]
    plain, quick = (ClipBackbone(str(tiny_config), None, 56, quick).encode_states(prompts) for quick in (False, True))
    assert not torch.equal(plain, quick)
    mini = ClipBackbone(str(mini_clip.config), str(mini_clip.weights), 70).encode_states(prompts)
    assert mini.shape != plain.shape or not torch.equal(mini, plain)


def test_a_cache_that_cannot_be_written_is_no_error(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "hub").write_text("no folder")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    states = ClipBackbone(str(tiny_config), None, 56).encode_states([["a liver"], ["a damaged liver"]])
    assert states.isfinite().all()
