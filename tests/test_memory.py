"""Want of memory ends a run with advice, beside the error itself."""

import logging

import pytest
import torch
from anomalib.engine import Engine

from anomalib_mvfa import BMADFewShot, Dra, Mkd, Mvfa
from anomalib_mvfa.memory import ADVICE, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_want_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_processors_own_error_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize("kind", [Mvfa, Mkd, Dra])
@pytest.mark.parametrize("step", ["training_step", "test_step"])
def test_advice_names_what_is_in_use(monkeypatch, phantom_root, tiny_config, tmp_path, caplog, kind, step):
    arguments = {
        Mvfa: {"backbone": str(tiny_config), "pretrained": None, "image_size": 56},
        Mkd: {"backbone": "vgg11", "pre_trained": False, "image_size": 32},
        Dra: {"backbone": "resnet18", "pre_trained": False, "image_size": 128},
    }
    model = kind(**arguments[kind], max_epochs=1, visualizer=False)

    def fail(*_, **__):
        msg = "CUDA out of memory. Tried to allocate 2.00 GiB."
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr(model, step, fail)
    data = BMADFewShot(phantom_root, k_shot=1, eval_batch_size=7, num_workers=0)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, enable_progress_bar=False)
    with caplog.at_level(logging.ERROR, "anomalib.mvfa"), pytest.raises(torch.OutOfMemoryError, match="CUDA out of"):
        engine.train(model, datamodule=data)
    assert f"{ADVICE} (Now: cpu, train_batch_size=1, eval_batch_size=7.)" in caplog.text
