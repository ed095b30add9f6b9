"""runtime/devices.py: where and in what dtype to compute."""

import pytest
import torch
from random_models import DECODED, random_model, saved
from safetensors.torch import load_file, save_file

from miniplm.runtime.devices import choose_device, choose_dtype, cpu_multiplies_bf16
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


@pytest.mark.parametrize(
    ("capabilities", "found"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "amx_tile": True, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({"architecture": "arm64", "sve_bf16": True}, True),
        ({"architecture": "riscv64"}, False),
    ],
)
def test_instructions_for_bfloat16(monkeypatch, capabilities, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_multiplies_bf16() is found


def test_instructions_for_bfloat16_in_torch_2_10(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for vectors, tiles in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=vectors: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=tiles: answer)
        assert cpu_multiplies_bf16() is (vectors or tiles)
