"""runtime/devices.py: where and in what dtype to compute."""

import pytest
import torch
from random_models import DECODED, random_model, saved
from safetensors.torch import load_file, save_file

from miniplm.runtime.devices import choose_device, choose_dtype
from miniplm.runtime.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder with a tiny Qwen2 (tied: 97 x 32 embedding) as transformers writes it."""
    return saved(random_model(DECODED["qwen2 mha tied"]), tmp_path / "model")


def rewrite(folder, change):
    """Apply change(tensors) to the weights in a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_choosing_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"{device}.*0 GPUs"):
            choose_device(device)
    with pytest.raises(UserError, match="gpu"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda") and choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 GPUs"):
        choose_device("cuda:2")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == choose_dtype("bfloat16", "cpu") == torch.bfloat16
