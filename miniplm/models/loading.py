"""The models: Hugging Face ids, folders and .gguf files in, one interface out.

`load_model` gives a LanguageModel: packed token ids in, hidden states after the final norm out, and the
head's weight. Qwen2, Llama and Qwen3 become a Decoder; `TransformersLM` puts any other `AutoModelForCausalLM`
behind the same interface.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor

from ..runtime.devices import machine_bytes
from ..runtime.errors import UserError, reason
from ..runtime.files import hash_files, read_json
from ..runtime.gguf_header import read_gguf_header
from ..runtime.schema import Record, read_record
from .adapter import TransformersLM, quiet_transformers
from .architecture import check_memory, check_settings, forward_cost_of, read_config, without_memory
from .base import LanguageModel
from .decoder import Decoder, unsupported_reason
from .flops import ForwardFlops, forward_cost

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# The names of settings in a .gguf file, after that of the architecture, and in transformers.
GGUF_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


class WeightIndex(Record):
    """A model.safetensors.index.json: the file of each tensor, in its own folder."""

    weight_map: Annotated[dict[str, Annotated[str, Field(pattern=r"^[^/\\]+$")]], Field(min_length=1)]


MISSING, UNKNOWN, OTHER_SHAPE = "missing", "not of this architecture", "of another shape"


def load_model(
    name: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model for computing, in evaluation mode.

    Args:
        name: Hugging Face id, local folder, or .gguf file; of a training output, one of its checkpoints.
        dtype: of the weights, whatever the file holds.
    Raises:
        UserError: it cannot be found, read or computed; the line says which file or tensor.
    """
    path = _locate(name)
    if path.suffix == ".gguf":
        wrapped = load_with_transformers(path, dtype, device)
        if unsupported_reason(wrapped.config):
            return TransformersLM(wrapped, str(name)).eval()
        return _fill_decoder(wrapped.config, wrapped.state_dict(), path).to(device).eval()
    config, files = read_config(path, trust_remote_code), weight_files(path)
    if unsupported_reason(config):
        wrapped = load_with_transformers(path, dtype, device, trust_remote_code)
        return TransformersLM(wrapped, str(name)).eval()
    return _fill_decoder(config, _read_tensors(files, dtype, device), path).to(device).eval()


def model_config(name: str | os.PathLike[str], trust_remote_code: bool = False) -> "PreTrainedConfig":
    """transformers' config of the model `name`, which is no .gguf file. Errors as in load_model."""
    return read_config(_locate(name), trust_remote_code)


def forward_cost_of_model(name: str | os.PathLike[str], trust_remote_code: bool = False) -> ForwardFlops:
    """What a forward pass of the model `name` costs, by its config.json alone where it has one. Arguments and
    errors as in load_model."""
    path = _locate(name)
    if path.suffix == ".gguf":
        return forward_cost(load_model(path))
    return forward_cost_of(read_config(path, trust_remote_code), str(path), trust_remote_code)


def model_hash(name: str | os.PathLike[str]) -> str:
    """The identity of a model: its weights, and its config.json where it has one (the same weights with
    another RoPE base are another model)."""
    files = weight_files(name)
    config = files[0].with_name("config.json")
    return hash_files([*files, config] if config.exists() and files[0].suffix != ".gguf" else files)


def weight_files(name: str | os.PathLike[str]) -> list[Path]:
    """The files that hold a model's weights: .safetensors, shards in order, or the .gguf."""
    path = _locate(name)
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if not index.exists():
        raise UserError(
            f"{path} holds no model.safetensors; .bin files are not read, they can carry code: convert them "
            f"to safetensors (load them with transformers, then save_pretrained)"
        )
    names = read_record(WeightIndex, read_json(index), f"{index} is damaged", "download the model again")
    files = [path / file for file in sorted(set(names.weight_map.values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, though {index.name} names it: download the model again")
    return files


def _read_tensors(files: Sequence[Path], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import safe_open

    names = tensor_names(files, dtype.itemsize if torch.device(device).type == "cpu" else None)
    tensors = {}
    for file in files:
        for name in names[file]:
            # Tensors of an open file are the file itself: a copy is not changed by whoever overwrites it.
            # Opening it for each tensor keeps what has been copied from staying in memory a second time.
            with safe_open(file, framework="pt") as opened:
                tensors[name] = opened.get_tensor(name).to(device, dtype, copy=True)
    return tensors


def tensor_names(files: Sequence[Path], itemsize: int | None) -> dict[Path, list[str]]:
    """The names of the tensors in safetensors files, by their headers alone.

    Args:
        itemsize: bytes that an element will take in the machine's memory; None: it is not to go there.
    Raises:
        UserError: a file is not whole, holds weights that are no floating-point numbers, or all of them
            together do not fit into memory.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[Path, list[str]] = {}
    elements, available = 0, machine_bytes()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found[file] = list(opened.keys())
                tensors = {name: opened.get_slice(name) for name in found[file]}
                elements += sum(math.prod(tensor.get_shape()) for tensor in tensors.values())
                kinds = {name: str(tensor.get_dtype()) for name, tensor in tensors.items()}
        except SafetensorError as error:
            raise UserError(
                f"{file} is not a whole safetensors file ({reason(error)}): copy or download it again"
            ) from error
        for name, kind in kinds.items():
            if name.endswith(".weight") and not kind.startswith(("F", "BF")):
                raise UserError(
                    f"{file} holds {name} as {kind}, weights must be floating-point numbers: copy or "
                    f"download it again, or give a model that is not quantised"
                )
    if itemsize and available and elements * itemsize > available:
        raise UserError(
            f"the weights in {files[0].parent} take {elements * itemsize / 1e9:,.1f} GB of memory, this "
            f"machine has {available / 1e9:,.1f} GB: take a smaller model or a larger machine"
        )
    return found


def _fill_decoder(config: "PreTrainedConfig", tensors: dict[str, Tensor], path: Path) -> Decoder:
    """A Decoder whose parameters are the tensors themselves; UserError unless names and shapes are exactly
    its own."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    # As transformers has it: a file with two different ones means two.
    if config.tie_word_embeddings and head in tensors:
        if embedding not in tensors:
            tensors[embedding] = tensors.pop(head)
        elif torch.equal(tensors[head], tensors[embedding]):
            del tensors[head]
        else:
            config.tie_word_embeddings = False
    model = cast(Decoder, without_memory(config, str(path)))
    expected = model.state_dict()
    # Old files hold the frequencies too.
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    _refuse_tensors(path, MISSING, [name for name in expected if name not in found])
    _refuse_tensors(path, UNKNOWN, [name for name in found if name not in expected])
    _refuse_tensors(
        path, OTHER_SHAPE, [name for name in expected if expected[name].shape != found[name].shape]
    )
    model.load_state_dict(found, assign=True)
    return model


def _refuse_tensors(path: Path, problem: str, names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"the weights in {path} do not fit its config: {len(names)} {problem} "
            f"({', '.join(names[:3])}{', …' * (len(names) > 3)}): "
            "download or save the model again"
        )


def load_with_transformers(
    name: str | os.PathLike[str],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """transformers' own model, in evaluation mode; .gguf weights dequantised. Arguments and errors as in
    load_model."""
    import transformers

    path = _locate(name)
    options: dict[str, Any] = {}
    if path.suffix == ".gguf":
        if missing := [
            package for package in ("gguf", "accelerate") if not importlib.util.find_spec(package)
        ]:
            raise UserError(f"{path} needs the package {missing[0]}: pip install miniplm[gguf]")
        _check_gguf(path, dtype)
        options["gguf_file"] = path.name
        # Newer versions would otherwise keep them quantised where they have a kernel for it.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        config = read_config(path, trust_remote_code)
        check_memory(config, dtype.itemsize, str(path), trust_remote_code)
        if getattr(config, "quantization_config", None) is None:
            tensor_names(weight_files(path), dtype.itemsize)
    try:
        with quiet_transformers():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path if path.is_dir() else path.parent,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers raises anything, from KeyError to OSError
        raise UserError(f"transformers cannot load {path}: {reason(error)}") from error
    # What transformers declares is the model alone.
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    _refuse_tensors(path, MISSING, sorted(info["missing_keys"]))
    _refuse_tensors(path, OTHER_SHAPE, sorted(name for name, *_ in info["mismatched_keys"]))
    return model.eval().to(device)


def _check_gguf(path: Path, dtype: torch.dtype) -> None:
    """UserError if a .gguf file is not whole, or describes no model that this machine has the memory for."""
    header, available = read_gguf_header(path), machine_bytes()
    sizes = {
        GGUF_SETTINGS[key.partition(".")[2]]: value
        for key, value in header.settings.items()
        if key.partition(".")[2] in GGUF_SETTINGS
    }
    check_settings({"model_type": None, **sizes}, path)
    if available and header.elements * dtype.itemsize > available:
        raise UserError(
            f"the weights in {path} take {header.elements * dtype.itemsize / 1e9:,.1f} GB of memory, this "
            f"machine has {available / 1e9:,.1f} GB: take a smaller model or a larger machine"
        )


def _locate(name: str | os.PathLike[str]) -> Path:
    """The folder or .gguf file that a model's name stands for; a Hugging Face id is downloaded (or found in
    the cache)."""
    path = Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise UserError(f"model {name} is a file: give a folder, a .gguf file or a Hugging Face id")
    if (
        path.suffix == ".gguf"
        or path.is_absolute()
        or str(name).startswith((".", "~"))
        or str(name).count("/") > 1
    ):
        raise UserError(f"model {name} does not exist")
    return _download(str(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        # Weights lie at the top of a repository; below are copies in other formats.
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (HTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError) as error:
        raise UserError(
            f"model {name} is neither a local folder nor a Hugging Face model that can be reached: "
            f"{reason(error)}"
        ) from error
