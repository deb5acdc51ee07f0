"""What tests share: a tiny CLIP with reference figures, a tinier one without, and a small data set.

Fixtures import what they need: the process that hands tests out to others needs none of it.
"""

import ctypes
import gc
import inspect
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

# Arrays are small here, and threads would mostly wait for each other: up to 300 times as long on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"  # which torch reads when it is imported, here and in child processes


def pytest_collection_finish():
    """Keep what is imported out of later garbage collections, which otherwise walk through millions of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep text features out of the user's cache, and of what another version of the code has left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_stack():
    """Let jsonargparse look for its caller without the source lines of all, which took half a second each time."""

    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        del context
        frame, frames = sys._getframe(1), []
        while frame is not None:
            code = frame.f_code
            frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
            frame = frame.f_back
        return frames

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "stack", stack)
        yield


@pytest.fixture(scope="module", autouse=True)
def _memory():
    """Give memory back between files, of which some make and drop large models."""
    yield
    gc.collect()  # models and trainers refer to each other
    with suppress(OSError, AttributeError):  # of other systems
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def mini_clip(tmp_path_factory: pytest.TempPathFactory):
    """Return the paths ``config``, ``weights`` and ``adapters`` of ``figures/mini.json``'s CLIP, for 70 px images."""
    from recipe import MINI, write_clip

    return write_clip(tmp_path_factory.mktemp("mini_clip"), MINI)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a model config of 4 blocks, for use with ``pretrained=None``."""
    from recipe import TINY, write_config

    return write_config(tmp_path_factory.mktemp("tiny_clip") / "tiny.json", TINY)


@pytest.fixture
def tiny_model(tiny_config: Path):
    """Return a model with random weights, for 56 px images (G = 4), in eval mode and without bank or ranges."""
    import torch

    from anomalib_mvfa.model.build import build_mvfa
    from recipe import TINY

    model = build_mvfa(str(tiny_config), pretrained=None, image_size=TINY.image_size).eval()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(model.backbone.joint_width, 2, generator=generator)
    model.text_features.copy_(torch.nn.functional.normalize(features, dim=0))
    return model


@pytest.fixture(scope="module")
def small_teacher():
    """Give MKD a small VGG, whatever its name; torchvision's have a classifier of 100 million weights to draw."""
    from anomalib_mvfa.baselines import mkd
    from recipe import vgg_features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mkd, "get_model", lambda name, weights: SimpleNamespace(features=vgg_features()))
        yield


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a data set in BMAD's layout, of 64 px images; read it, and write nothing there."""
    from anomalib_mvfa.data.phantom import write_phantom

    root = tmp_path_factory.mktemp("phantom_root")
    write_phantom(root, size=64, train=4, valid=6, test=4)
    return root


@pytest.fixture(scope="session")
def categories(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with that data set as Brain, and another of the same form as Chest, whose masks are not read."""
    from anomalib_mvfa.data.phantom import write_phantom

    root = tmp_path_factory.mktemp("categories")
    write_phantom(root, seed=1, size=64, train=4, valid=6, test=4)
    (root / "Brain").rename(root / "Chest")
    shutil.copytree(phantom_root / "Brain", root / "Brain")
    return root


@pytest.fixture(scope="session")
def support_lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``Brain/2-shot.txt``, a support list of the published form that fits ``phantom_root``."""
    from recipe import write_support_list

    folder = tmp_path_factory.mktemp("support_lists")
    write_support_list(folder, "Brain", normal=["004.png", "001.png"], abnormal=["000.png", "005.png"])
    return folder
