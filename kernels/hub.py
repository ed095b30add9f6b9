"""Lay the ops out as a kernel of the Hugging Face Hub, for its `kernels` library to load:

    python -m miniplm.kernels.hub FOLDER

FOLDER is then what a kernel repository holds, and what `kernels.get_local_kernel(Path(FOLDER))` opens:

    build.toml, flake.nix, torch-ext/miniplm_kernels/   what kernel-builder builds from
    build/torch-cpu/, build/torch-cuda/                 built: the same files, as Python is not compiled
    README.md, LICENSE

The library imports a build under its `id`, under which its ops must be registered. The id holds a hash of the
files, so other versions of them, and the installed miniplm.kernels, may be in the same process.
"""

import argparse
import base64
import hashlib
import inspect
import json
import sys
from importlib.metadata import distribution
from pathlib import Path

SOURCE = Path(__file__).parent
NAME, MODULE = "miniplm-kernels", "miniplm_kernels"
VERSION = 0  # the Hub's convention for what is not for production yet
BACKENDS = ["cpu", "cuda"]

BUILD = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""

FLAKE = """\
{
  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernels
- triton
---

# MiniPLM's ops

What training and scoring a language model spend their time on, for packed batches without padding: the
head's log-probabilities, cross-entropy and distillation loss without a tensor of [tokens, vocabulary] in
memory; causal attention within documents; RMSNorm, SwiGLU, rotary embedding; rows quantised to float8.
Forward and backward, in Triton, with a PyTorch reference that runs on the CPU. The Triton kernels have not
run on a GPU yet: hence version 0.

```python
import torch
from kernels import get_kernel  # of a folder on this machine: get_local_kernel(Path(folder))

# The library runs a repository's code only where told so, outside the few that it trusts.
ops = get_kernel("NAME/miniplm-kernels", version=0, trust_remote_code=True)
hidden, head = torch.randn(6, 32), torch.randn(100, 32)
print(ops.linear_cross_entropy(hidden, head, torch.arange(6)))
help(ops.linear_cross_entropy)  # shapes, dtypes, formula
```

| op | what it computes |
| --- | --- |
{table}

`layers.RMSNorm` and `layers.SiluAndMul` are for `kernels.kernelize`. Needs PyTorch 2.10, Python 3.10 and, on
a GPU, Triton 3.6.
"""


def lay_out(output: Path) -> None:
    """Write the kernel repository.

    Args:
        output: a folder that is empty or not there yet; ValueError otherwise.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not an empty folder: name another one")
    files = {path.name: path.read_bytes() for path in sorted(SOURCE.glob("*.py")) if path.name != "hub.py"}
    for folder in (f"torch-ext/{MODULE}", *(f"build/torch-{backend}" for backend in BACKENDS)):
        for name, content in files.items():
            _write(output / folder / name, content)
    for backend in BACKENDS:
        metadata = json.dumps(_metadata(files, backend), indent=2) + "\n"
        _write(output / f"build/torch-{backend}/metadata.json", metadata.encode())
    for name, text in ("build.toml", BUILD), ("flake.nix", FLAKE), ("README.md", _card()):
        _write(output / name, text.encode())
    licence = distribution("miniplm").read_text("licenses/LICENSE")  # of the wheel
    _write(output / "LICENSE", (licence or "Apache-2.0\n").encode())


def _metadata(files: dict[str, bytes], backend: str) -> dict:
    unique = hashlib.sha256(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
    digests = {
        name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()
    }
    return {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{unique[:12]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def _card() -> str:
    package = sys.modules[__package__ or ""]
    ops = {name: getattr(package, name) for name in package.__all__}
    paragraphs = {
        name: (inspect.getdoc(op) or "").split("\n\n")[0]
        for name, op in ops.items()
        if not isinstance(op, type)
    }
    return CARD.format(
        table="\n".join(f"| `{name}` | {' '.join(text.split())} |" for name, text in paragraphs.items())
    )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay the ops out as a kernel of the Hugging Face Hub.")
    parser.add_argument("output", type=Path, metavar="FOLDER", help="empty, or not there yet")
    try:
        lay_out(parser.parse_args().output)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
