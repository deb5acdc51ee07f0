"""Files from strangers: none of their code runs, none is written outside of its folder, none is taken for another."""

import ast
import hashlib
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import DownloadInfo
from anomalib.engine import Engine

from anomalib_mvfa import BMADOneClass, Mvfa, load_adapters
from anomalib_mvfa.baselines.med_clip import StageBackbone
from anomalib_mvfa.compare.config import Comparison
from anomalib_mvfa.compare.models import build_model
from anomalib_mvfa.compare.results import read_arrays
from anomalib_mvfa.model.backbone import ClipBackbone
from anomalib_mvfa.model.weights import checked_download
from recipe import TINY, adapter_weights

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path):
    """A thing whose pickle touches a file, which must not be there in the end."""
    path = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(Evil(path)))  # noqa: S301  # ours
    assert path.exists()
    path.unlink()
    yield Evil(path)
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------- Code in files


def test_nothing_is_unpickled_without_restraint():
    """By whatever name: torch.load takes weights alone, numpy no objects, YAML plain values.

    TorchScript archives are loaded in one place, which checks them first (tests/model/test_weights.py).
    """
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names}
                module = getattr(node, "module", None)
                if {"pickle", "dill", "joblib", "cloudpickle"} & {module, *names}:
                    found.append((path.name, node.lineno, names))
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            needed = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
            needed["timm.models.load_state_dict"] = needed["torch.load"]
            if name in needed and options.get(needed[name][0]) != needed[name][1]:
                found.append((path.name, node.lineno, name))
            if name == "torch.jit.load" and path.name == "weights.py" and path.parent.name == "model":
                continue
            unsafe = ("torch.jit.load", "yaml.load", "yaml.unsafe_load", "eval", "exec", "torch.hub.load")
            if name in unsafe or name.startswith("torch.package"):
                found.append((path.name, node.lineno, name))
    assert len(SOURCES) > 50
    assert not found


def test_checkpoint(evil, tmp_path, tiny_config):
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56)
    checkpoint = {"state_dict": {}, "mvfa": evil, "pytorch-lightning_version": "2.6.0"}
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Engine(default_root_dir=tmp_path, accelerator="cpu").test(model, ckpt_path=tmp_path / "model.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Mvfa.load_from_checkpoint(tmp_path / "model.ckpt")


PATCHCORE = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18"}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("adapters.pth", lambda path, model, config: load_adapters(model, path)),
        ("clip.pt", lambda path, model, config: ClipBackbone(config, path, 56)),
        ("clip.safetensors", lambda path, model, config: ClipBackbone(config, path, 56)),
        ("resnet.pth", lambda path, model, config: build_model(PATCHCORE, path)),
    ],
)
def test_weights(evil, tiny_model, tiny_config, tmp_path, zipped, name, read):
    content = {**adapter_weights(TINY), "more": evil} if name == "adapters.pth" else {"conv1.weight": evil}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
        read(str(tmp_path / name), tiny_model, str(tiny_config))


def test_archive_of_med_clip(evil, tmp_path):
    torch.save({"weight": evil}, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "medclip.zip", "w") as archive:
        archive.write(tmp_path / "pytorch_model.bin", "../pytorch_model.bin")
    with pytest.raises(ValueError, match=r"medclip\.zip' cannot be read \(.*its pytorch_model\.bin must be a state "):
        StageBackbone("resnet18", str(tmp_path / "medclip.zip"), 64)
    assert not (tmp_path.parent / "pytorch_model.bin").exists()


def test_results_of_others(evil, tmp_path):
    np.savez(tmp_path / "saved.npz", paths=np.array([evil], dtype=object), labels=np.array([evil], dtype=object))
    with pytest.raises(ValueError, match=r"saved\.npz cannot be read"):
        read_arrays(tmp_path / "saved.npz")


def test_configs(evil, tmp_path):
    (tmp_path / "compare.yaml").write_text(f"methods: !!python/object/apply:pathlib.Path.touch [{evil.path}]\n")
    with pytest.raises(ValueError, match=r"compare\.yaml' is no YAML file \(could not determine a constructor"):
        Comparison.load(tmp_path / "compare.yaml")


# ----------------------------------------------------------------------------------------------------------- Downloads


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Return a function that has BMAD's address serve an archive with these members."""

    def serve(members, hashsum=None):
        archive = tmp_path / "served.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        expected = hashsum or hashlib.sha256(archive.read_bytes()).hexdigest()
        info = DownloadInfo(name="bmad", url="https://example.org/bmad.zip", hashsum=expected)
        monkeypatch.setattr("anomalib.data.datamodules.image.bmad.DOWNLOAD_INFO", info)
        monkeypatch.setattr(
            "anomalib.data.utils.download.urlretrieve",
            lambda url, filename, **_: Path(filename).write_bytes(archive.read_bytes()),
        )

    return serve


def test_another_data_set_than_the_published_one_is_refused(served, tmp_path):
    served({"Brain/test/good/img/a.png": "not it"}, hashsum="0" * 64)
    with pytest.raises(RuntimeError, match=r"could not be downloaded to it \(Calculated hash .* does not match"):
        BMADOneClass(tmp_path / "data/BMAD").prepare_data()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".BMAD.lock"]


def test_an_archive_writes_nothing_outside_of_its_folder(served, tmp_path):
    outside = tmp_path / "absolute.txt"
    served({"../../up.txt": "", str(outside): "", "Brain/../../../up.txt": "", "Brain/test/good/img/a.png": ""})
    BMADOneClass(tmp_path / "data/BMAD").prepare_data()
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["data/BMAD/Brain/test/good/img/a.png", "served.zip"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_download_that_is_cut_short_is_told_by_its_name(tmp_path, whole):
    """The cache of Hugging Face links a file's name to one that is named by the SHA-256 of its content."""
    content = b"weights of a CLIP"
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content if whole else content[:5])
    link = tmp_path / "open_clip_model.safetensors"
    link.symlink_to(blob)
    if whole:
        assert checked_download(link) == link
    else:
        with pytest.raises(ValueError, match=r"is not what its name says: its content has the SHA-256 .*\. Remove it"):
            checked_download(link)


def test_clip_is_checked_once_it_is_downloaded(tmp_path, monkeypatch):
    blob = tmp_path / ("0" * 64)
    torch.save({}, blob)
    monkeypatch.setattr("open_clip.download_pretrained", lambda config: str(blob))
    with pytest.raises(RuntimeError, match=r"'openai' of ViT-B-32 could not be loaded .*is not what its name says"):
        ClipBackbone("ViT-B-32", "openai", 224)


def test_med_clip_has_no_checksum_and_is_not_downloaded():
    with pytest.raises(ValueError, match=r"pretrained='medclip' is no file\. .*not downloaded by itself, since its au"):
        StageBackbone("resnet50", "medclip", 224)
