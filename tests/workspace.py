"""What shipped configs and the commands of README and docs find where they look by default: data, weights, adapters."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from anomalib_mvfa.data.bmad import CATEGORIES
from anomalib_mvfa.data.phantom import write_phantom
from recipe import TINY, WINDOWS, adapter_weights, clip_weights, write_config, write_support_list
from scan_recipe import write_nifti

SIZE = 32
PATIENTS = 5
"""With lesions, and again without, of the scans."""
NORMAL = ["004.png", "001.png", "003.png", "000.png"]
ABNORMAL = ["000.png", "005.png", "002.png", "001.png"]
"""Names in the support list, not those that the seed would draw."""
CONFIGS = Path(__file__).parents[1] / "configs"
BLOCKS = {6: 1, 12: 2, 18: 3, 24: 4}
"""Levels of ViT-L, and those of the tiny CLIP that stand for them."""
RESIZE = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}}
SIZE_64 = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": RESIZE}}
SMALL = {
    "AnomalyDINO": {"encoder_name": "vit_small_patch14_dinov2"},
    "AprilGan": {"backbone": "weights/tiny.json", "image_size": 56, "max_epochs": 1},
    "Bgad": {
        "backbone": "test_resnet",
        "layers": ["layer3"],
        "image_size": 64,
        "coupling_blocks": 1,
        "max_epochs": 1,
        "warmup_epochs": 0,
    },
    "Cflow": {"backbone": "test_resnet", "layers": ["layer2"], "coupling_blocks": 1, "pre_processor": SIZE_64},
    "Clip": {"backbone": "weights/tiny.json", "image_size": 56},
    "Dra": {"backbone": "test_resnet", "image_size": 128, "max_epochs": 1},
    "MedClip": {"backbone": "test_resnet", "image_size": 64},
    "Mkd": {"backbone": "vgg11", "image_size": 32, "max_epochs": 1},
    "FoundAD": {"encoder_name": "dinov2_vit_small_14", "image_size": 56, "pred_depth": 1},
    "Mvfa": {"backbone": "weights/tiny.json", "image_size": 56, "max_epochs": 1},
    "MvfaPlus": {"backbone": "weights/tiny.json", "image_size": 56, "max_epochs": 1},
    "Patchcore": {"backbone": "test_resnet", "layers": ["layer3"], "pre_processor": SIZE_64},
    "ReverseDistillation": {"backbone": "resnet18", "pre_processor": SIZE_64},
    "WinClipBaseline": {"backbone": "weights/windows.json"},
}
"""Arguments that make a comparison's models small."""
FROM_CACHE = ("AnomalyDINO", "FoundAD")
"""Models that load weights from the cache of Hugging Face alone."""


def small_comparison(path: Path) -> dict[str, Any]:
    """Return a comparison of configs/compare with small models, one epoch, one seed and as few categories as can be.

    These are one with masks and one without, where methods learn from other categories.
    """
    config = yaml.safe_load(path.read_text())
    if config.get("categories"):
        protocols = {method["protocol"] for method in config["methods"].values()}
        kept = {"Brain", "screw"} | ({"Chest"} if "leave_one_out" in protocols else set())
        config["categories"] = [name for name in config["categories"] if name in kept]
    config["k_shots"] = [1, 2] if len(config.get("k_shots", [4])) > 1 else [1]
    config["seeds"] = config["seeds"][:1]
    random = [name for name, method in config["methods"].items() if method["model"]["class_path"] not in FROM_CACHE]
    config["weights"] = dict.fromkeys(random)
    config["accelerator"] = "cpu"
    sources = config["data"] if isinstance(config["data"], list) else [config["data"]]
    if len(sources) > 1:
        config["data"] = sources = [one for one in sources if one["init_args"]["name"] in {"Kidney", "Chest"}]
    for mapping in sources:
        mapping["init_args"]["num_workers"] = 0
    for method in config["methods"].values():
        arguments = {**method["model"].get("init_args", {}), **SMALL[method["model"]["class_path"]]}
        method["model"]["init_args"] = arguments
        if "levels" in arguments:
            arguments["levels"] = [*range(1, 1 + len(arguments["levels"]))]
        for name in {"train_levels", "score_levels"} & set(arguments):
            arguments[name] = [BLOCKS[block] for block in arguments[name]]
        if method["protocol"] == "few_shot":
            method["data"] = {"train_batch_size": 22}  # all views in one step
        if "max_epochs" in method.get("trainer", {}):
            method["trainer"]["max_epochs"] = 1
    return config


def write_workspace(folder: Path) -> None:
    """Write BMAD, MVTec AD and own data of few slices each, a support list, and a tiny CLIP with adapters."""
    bmad = folder / "datasets" / "BMAD"
    bmad.mkdir(parents=True)
    for seed, (name, category) in enumerate(CATEGORIES.items()):
        write_phantom(folder / name, seed=seed, size=SIZE, train=1, valid=6, test=4)
        (folder / name / "Brain").rename(bmad / name)
        (folder / name).rmdir()
        for masks in () if category.has_masks else [*bmad.glob(f"{name}/*/*/label")]:
            shutil.rmtree(masks)
    _write_tables(bmad, folder / "datasets" / "real")
    write_support_list(folder / "datasets" / "fewshot_seed", "Brain", NORMAL, ABNORMAL)
    write_phantom(folder / "slices", seed=len(CATEGORIES), size=SIZE, train=0, valid=20, test=20)
    slices = folder / "slices" / "Brain"
    _write_own(slices, folder / "datasets" / "own")
    write_scans(slices, folder / "datasets" / "scans")
    _write_mvtec(slices, folder / "datasets" / "MVTecAD" / "screw")
    _write_models(folder)
    shutil.copytree(CONFIGS, folder / "configs")
    for path in (folder / "configs" / "compare").glob("*.yaml"):
        path.write_text(yaml.safe_dump(small_comparison(path), sort_keys=False))


def _write_tables(bmad: Path, root: Path) -> None:
    """Write folders, and tables of their images that say what is tested, one with masks and one without."""
    root.mkdir()
    for name, category in (("Kidney", "Brain"), ("Chest", "Chest")):
        (root / name).symlink_to(bmad / category)
        rows = ["image,label,mask,split"]
        for image in sorted(bmad.glob(f"{category}/[tv]*/*/img/*")):
            kind, split = image.parts[-3], image.parts[-4]
            mask = _mask(image) if kind == "Ungood" and category == "Brain" else ""
            label = {"good": "normal", "Ungood": "abnormal"}[kind]
            if split != "train":
                rows.append(f"{image},{label},{mask},{'train' if split == 'valid' else 'test'}")
        (root / f"{name}.csv").write_text("\n".join(rows))


def _write_own(slices: Path, root: Path) -> None:
    """Write folders of images, two of a patient; two patients have both normal and abnormal images."""
    for kind in ("normal", "abnormal", "masks"):
        (root / kind).mkdir(parents=True)
    for index, path in enumerate(sorted(slices.glob("test/good/img/*"))):
        shutil.copy(path, root / "normal" / f"p{index // 2:02d}_{index % 2}.png")
    for index, path in enumerate(sorted(slices.glob("test/Ungood/img/*"))):
        name = f"p{8 + index // 2:02d}_{2 + index % 2}.png"
        shutil.copy(path, root / "abnormal" / name)
        shutil.copy(_mask(path), root / "masks" / name)


def write_scans(slices: Path, root: Path) -> None:
    """Write volumes of 5 slices in Hounsfield units; of those with lesions, the last slice has none."""
    images, masks = ({}, {})
    for kind in ("good", "Ungood"):
        paths = sorted(slices.glob(f"*/{kind}/img/*"))
        images[kind] = [np.asarray(Image.open(path), np.int16) * 4 - 200 for path in paths]
        masks[kind] = [np.asarray(Image.open(_mask(path))) // 255 for path in paths] if kind == "Ungood" else []
    for patient in range(PATIENTS):
        write_nifti(root / f"healthy/p{patient}.nii.gz", _volume(images["good"][5 * patient :][:5]))
        ill = slice(4 * patient, 4 * patient + 4)
        write_nifti(root / f"ill/q{patient}.nii.gz", _volume([*images["Ungood"][ill], images["good"][30 + patient]]))
        empty = np.zeros_like(masks["Ungood"][0])
        write_nifti(root / f"drawn/q{patient}.nii.gz", _volume([*masks["Ungood"][ill], empty]))


def _volume(planes: list[np.ndarray]) -> np.ndarray:
    """Stack slices so that they are shown as they are."""
    return np.stack(planes, axis=-1).transpose(1, 0, 2)[::-1, ::-1]


def _write_mvtec(slices: Path, root: Path) -> None:
    for part in ("train/good", "test/good", "test/broken", "ground_truth/broken"):
        (root / part).mkdir(parents=True)
    for index in range(10):
        name = f"{index:03d}.png"
        shutil.copy(slices / "valid/good/img" / name, root / "train/good")
        shutil.copy(slices / "test/good/img" / name, root / "test/good")
        shutil.copy(slices / "test/Ungood/img" / name, root / "test/broken")
        shutil.copy(slices / "test/Ungood/label" / name, root / f"ground_truth/broken/{index:03d}_mask.png")


def _write_models(folder: Path) -> None:
    """Write a CLIP under the name of OpenAI's weight file, its config, and adapters under their published name."""
    (folder / "weights").mkdir()
    (folder / "checkpoints" / "few-shot").mkdir(parents=True)
    write_config(folder / "weights" / "tiny.json", TINY)
    write_config(folder / "weights" / "windows.json", WINDOWS)
    torch.save(clip_weights(TINY), folder / "weights" / "ViT-L-14-336px.pt")
    torch.save(adapter_weights(TINY), folder / "checkpoints" / "few-shot" / "Brain.pth")


def _mask(image: Path) -> Path:
    return image.parents[1] / "label" / image.name
