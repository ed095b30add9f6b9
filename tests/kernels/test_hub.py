"""What hub.py lays out, opened by the Hub's `kernels` library from a folder: make hub-kernels installs it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miniplm.kernels import hub
from random_inputs import op_arguments
from torch.utils.flop_counter import FlopCounterMode

from miniplm import kernels

# Without it the import finds our folder of that name, version 0.
library = pytest.importorskip("kernels", minversion="0.17", reason="needs the PyPI package kernels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("hub") / "miniplm-kernels"
    hub.lay_out(output)
    return output


@pytest.fixture(scope="module")
def loaded(folder):
    return library.get_local_kernel(folder, backend="cpu")


def test_both_stand_in_one_process(folder, loaded):
    assert Path(loaded.__file__) == folder / "build/torch-cpu/__init__.py"
    assert loaded.__all__ == kernels.__all__
    mine = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("miniplm::")}
    hubs = {f"{loaded.__name__}::{name.removeprefix('miniplm::')}" for name in mine}
    assert len(mine) == len(op_arguments())
    assert hubs <= {schema.name for schema in torch._C._jit_get_all_schemas()}
    dispatch = sys.modules[f"{loaded.__name__}.dispatch"]
    assert dispatch.TRITON.keys() == kernels.dispatch.TRITON.keys()
    assert not set(dispatch.TRITON.values()) & set(kernels.dispatch.TRITON.values())


@pytest.mark.parametrize("name", op_arguments())
def test_an_op_gives_the_same(loaded, name):
    arguments, results, flops = op_arguments()[name], [], []
    for package in ("miniplm", loaded.__name__):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            results.append(getattr(getattr(torch.ops, package), name)(*arguments))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_triton_runs_from_there(loaded, monkeypatch, choice):
    pytest.importorskip("triton")
    monkeypatch.setenv("MINIPLM_KERNELS", choice)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate, up = torch.linspace(-3, 3, 24, device=device).view(2, 2, 6)
    torch.testing.assert_close(loaded.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_gradients_are_the_same(loaded):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 16, generator=generator), torch.randn(50, 16, generator=generator)
    gradients = []
    for package in (kernels, loaded):
        x = hidden.clone().requires_grad_()
        package.linear_cross_entropy(package.rms_norm(x, torch.ones(16)), head, torch.arange(6)).backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_another_version_stands_beside(folder, loaded, tmp_path, monkeypatch):
    shutil.copytree(hub.SOURCE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "source/checks.py", "a") as file:
        file.write("MARK = 1\n")
    monkeypatch.setattr(hub, "SOURCE", tmp_path / "source")
    hub.lay_out(tmp_path / "other")
    other = library.get_local_kernel(tmp_path / "other", backend="cpu")
    assert other.__name__ != loaded.__name__ and other.checks.MARK and not hasattr(loaded.checks, "MARK")
    x, weight = torch.ones(2, 4), torch.full((4,), 3.0)
    assert torch.equal(other.rms_norm(x, weight), loaded.rms_norm(x, weight))


def test_files_are_those_of_the_package(folder):
    names = {path.name for path in hub.SOURCE.glob("*.py")} - {"hub.py"}
    for place in ("torch-ext/miniplm_kernels", "build/torch-cpu", "build/torch-cuda"):
        assert {path.name for path in (folder / place).iterdir()} - {"metadata.json"} == names
        assert all((folder / place / name).read_bytes() == (hub.SOURCE / name).read_bytes() for name in names)
    assert "Apache License" in (folder / "LICENSE").read_text()
    card = (folder / "README.md").read_text()
    ops = {name for name in kernels.__all__ if name.islower()}
    assert {line.split("`")[1] for line in card.splitlines() if line.startswith("| `")} == ops


def test_the_librarys_own_checks_pass(folder):
    """Those of its private module that kernel-builder is made of too, as long as they are there."""
    rust = pytest.importorskip("kernels._rust")
    assert {str(each).split(".")[-1].lower() for each in rust.Build.open(folder).general.backends} == {
        "cpu",
        "cuda",
    }
    for backend in hub.BACKENDS:
        variant = folder / f"build/torch-{backend}"
        metadata = library.Metadata.read_from_file(variant / "metadata.json")
        assert metadata.version == hub.VERSION and metadata.name.python_name == hub.MODULE
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))


def test_norms_of_a_transformers_model(folder, monkeypatch):
    """kernelize puts the Hub's RMSNorm into a Qwen2 model; transformers' mapping of that name, on the CPU."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=100, num_key_value_heads=2, **sizes)).double()
    norms = [module for module in model.modules() if isinstance(module, Qwen2RMSNorm)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    ids = torch.arange(12)[None]

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return [out.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    before = step()
    for name in ("kernel_layer_name", "kernel_condition"):  # whichever versions of kernels transformers takes
        monkeypatch.setattr(Qwen2RMSNorm, name, None, raising=False)
    library.replace_kernel_forward_from_hub(Qwen2RMSNorm, "RMSNorm")
    layer = library.LocalLayerRepository(folder, layer_name="RMSNorm")
    with library.use_kernel_mapping({"RMSNorm": {"cpu": layer}}, inherit_mapping=False):
        library.kernelize(
            model, mode=library.Mode.TRAINING | library.Mode.TORCH_COMPILE, device="cpu", use_fallback=False
        )
    assert len(norms) == 5
    assert {norm.forward.__func__ for norm in norms} == {layer.load().forward}
    assert layer.load().__module__.startswith("_miniplm_kernels_")
    torch.testing.assert_close(step(), before, rtol=1e-6, atol=1e-7)


def test_gate_and_up_side_by_side(loaded):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
    torch.testing.assert_close(loaded.layers.SiluAndMul()(x), expected)


def test_command(tmp_path):
    command = [sys.executable, "-m", "miniplm.kernels.hub", str(tmp_path / "out")]
    assert subprocess.run(command).returncode == 0
    metadata = json.loads((tmp_path / "out/build/torch-cuda/metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda"}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is not an empty folder" in again.stderr
