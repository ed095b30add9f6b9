"""The models: Hugging Face ids, folders and .gguf files in, one interface out.

`load_model` gives a LanguageModel: packed token ids in, hidden states after the final norm out, and the head's weight.
Qwen2, Llama and Qwen3 become a Decoder; `Adapter` puts any other `AutoModelForCausalLM` behind the same interface.
"""

import contextlib
import importlib.util
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from .artifacts import UserError, hash_files, latest_checkpoint, read_json
from .decoder import Decoder, LanguageModel, student_config, unsupported

__all__ = ["Adapter", "Decoder", "LanguageModel", "choose_device", "choose_dtype", "load_model", "load_with_transformers", "model_hash",
           "student_config", "weight_files"]

MISSING, UNKNOWN, OTHER_SHAPE = "missing", "not of this architecture", "of another shape"


class Adapter(LanguageModel):
    """Any other causal LM of transformers: packed outside, right-padded inside.

    Args:
        model: the AutoModelForCausalLM. UserError where its logits are not a multiple of hidden @ head_weight.T.
        name: what the user calls it, for messages.
    """

    def __init__(self, model, name: str):
        super().__init__()
        self.wrapped, self.config, self.scale = model.eval(), model.config, 1.0
        # Past these lengths position tables end, and some rotary embeddings change with the longest text of a batch.
        rope = getattr(model.config, "rope_parameters", None) or {}
        limits = [getattr(model.config, "max_position_embeddings", None), rope.get("rope_type") == "longrope" and rope["original_max_position_embeddings"]]
        self.context = min(filter(None, limits), default=math.inf)
        try:
            self._check(f"{name} ({model.config.model_type}) cannot be used")
        except UserError:
            raise
        except Exception as error:  # whatever a foreign model's code raises
            raise UserError(f"{name} ({model.config.model_type}) cannot be used: it does not compute plain text ({_one_line(error)})") from error

    @property
    def head_weight(self) -> Tensor:
        return self.wrapped.get_output_embeddings().weight

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        bounds = cu_seqlens.tolist()
        documents = sorted(itertools.pairwise(bounds), key=lambda bound: bound[0] - bound[1])  # longest first
        documents = [(start, end) for start, end in documents if end > start]
        if documents and documents[0][1] - documents[0][0] > self.context:
            raise UserError(f"a document of {documents[0][1] - documents[0][0]} tokens does not fit into the model's context of {self.context} "
                            f"({self.config.model_type}): prepare the corpus with a smaller max_length")
        hidden, places = [], []
        while documents:
            longest = documents[0][1] - documents[0][0]
            # A batch takes documents down to three quarters of its longest: padding is at most a quarter of it.
            group = [bound for bound in documents if 4 * (bound[1] - bound[0]) >= 3 * longest]
            documents = documents[len(group):]
            starts, ends = torch.tensor(group, device=input_ids.device).T[..., None]
            index = starts + torch.arange(longest, device=input_ids.device)  # [documents of the group, longest]
            ids = input_ids[torch.minimum(index, ends - 1)]  # the padding repeats the last token; no token sees it, see _check
            output = self.wrapped.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden.append(output[index < ends])
            places.append(index[index < ends])
        if not hidden:
            return self.head_weight.new_zeros(0, self.head_weight.shape[1])
        packed = torch.cat(hidden)[torch.argsort(torch.cat(places))]
        return packed if self.scale == 1 else packed * self.scale

    @torch.no_grad()
    def _check(self, refusal: str):
        """Find the factor between hidden @ head_weight.T and the model's own logits; refuse a model that has none."""
        head = self.wrapped.get_output_embeddings()
        no_product = f"{refusal}: its logits are not hidden × head"
        if not isinstance(getattr(head, "weight", None), Tensor):
            raise UserError(f"{no_product} (it has no head)")
        if getattr(head, "bias", None) is not None:
            raise UserError(f"{no_product} (the head has a bias)")
        if getattr(self.config, "final_logit_softcapping", None):  # invisible in the small logits of an untrained model
            raise UserError(f"{no_product} (they are soft-capped)")
        ids = 1 + torch.arange(9, device=head.weight.device) * ((len(head.weight) - 1) // 9)
        lengths = [9, 5, 0, 1]  # all begin alike
        bounds = torch.tensor([0, *lengths], device=ids.device).cumsum(0, dtype=torch.int32)
        hidden = self(torch.cat([ids[:length] for length in lengths]), bounds)
        logits = self.wrapped(input_ids=ids[None], use_cache=False).logits[0].float()
        product = (hidden[:9] @ head.weight.T).float()
        factor = float((product * logits).sum() / (product * product).sum())
        precise = head.weight.dtype == torch.float32
        tolerance = 1e-4 if precise else 5e-2
        if not _close(factor * product, logits, tolerance):
            raise UserError(f"{no_product} (they differ by more than a factor)")
        if not (_close(hidden[9:14], hidden[:5], tolerance) and _close(hidden[14:], hidden[:1], tolerance)):
            raise UserError(f"{refusal}: its hidden states depend on later tokens or on padding")
        if abs(factor - 1) > (1e-4 if precise else 1e-2):  # in half precision the logits' rounding averages out in the factor
            self.scale = factor

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs per token, estimated: 2 per parameter, embeddings only where they are the head, and causal attention if any."""
        embedding = self.wrapped.get_input_embeddings().weight
        looked_up = 0 if embedding is self.head_weight else embedding.numel()
        text = self.config.get_text_config()
        attention = 2 * text.num_hidden_layers * text.hidden_size * (context + 1) if hasattr(text, "num_attention_heads") else 0
        return 2 * (self.num_parameters() - looked_up) + attention

    def save_pretrained(self, folder):
        with _quiet_transformers():
            self.wrapped.save_pretrained(folder)


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


def load_model(name, dtype: torch.dtype = torch.float32, device="cpu", trust_remote_code: bool = False) -> LanguageModel:
    """Load a model for computing, in evaluation mode.

    Args:
        name: Hugging Face id, local folder (a training output gives its latest checkpoint), or .gguf file.
        dtype: of the weights, whatever the file holds.
    Raises:
        UserError: it cannot be found, read or computed; the line says which file or tensor.
    """
    path = _locate(name)
    if path.suffix == ".gguf":
        wrapped = load_with_transformers(path, dtype)
        model = Adapter(wrapped.to(device), str(name)) if unsupported(wrapped.config) else _fill_decoder(wrapped.config, wrapped.state_dict(), path)
        return model.to(device).eval()
    config, files = _read_config(path, trust_remote_code), weight_files(path)
    if unsupported(config):
        return Adapter(load_with_transformers(path, dtype, trust_remote_code).to(device), str(name)).eval()
    return _fill_decoder(config, _read_tensors(files, dtype, device), path).to(device).eval()


def model_hash(name) -> str:
    """The identity of a model: its weights, and its config.json where it has one (the same weights with another RoPE base are another model)."""
    files = weight_files(name)
    config = files[0].with_name("config.json")
    return hash_files([*files, config] if config.exists() and files[0].suffix != ".gguf" else files)


def weight_files(name) -> list[Path]:
    """The files that hold a model's weights: .safetensors, shards in order, or the .gguf."""
    path = _locate(name)
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if not index.exists():
        raise UserError(f"{path} holds no model.safetensors; .bin files are not read, they can carry code: convert them to safetensors "
                        "(load them with transformers, then save_pretrained)")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map: download the model again")
    files = [path / file for file in sorted(set(names.values()))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, though {index.name} names it: download the model again")
    return files


def _read_tensors(files, dtype: torch.dtype, device) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
            for name in names:
                # Tensors of an open file are the file itself: a copy is not changed by whoever overwrites it. Opening it
                # for each tensor keeps what has been copied from staying in memory a second time.
                with safe_open(file, framework="pt") as opened:
                    tensors[name] = opened.get_tensor(name).to(device, dtype, copy=True)
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file ({_one_line(error)}): copy or download it again") from None
    return tensors


def _fill_decoder(config, tensors: dict[str, Tensor], path: Path) -> Decoder:
    """A Decoder whose parameters are the tensors themselves; UserError unless names and shapes are exactly its own."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in tensors:  # as transformers has it: a file with two different ones means two
        if embedding not in tensors:
            tensors[embedding] = tensors.pop(head)
        elif torch.equal(tensors[head], tensors[embedding]):
            del tensors[head]
        else:
            config.tie_word_embeddings = False
    with torch.device("meta"):
        model = Decoder(config)
    expected = model.state_dict()
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # in old files
    for problem, names in [(MISSING, [name for name in expected if name not in found]),
                           (UNKNOWN, [name for name in found if name not in expected]),
                           (OTHER_SHAPE, [name for name in expected if name in found and expected[name].shape != found[name].shape])]:
        _refuse_tensors(path, problem, names)
    model.load_state_dict(found, assign=True)
    return model


def _refuse_tensors(path: Path, problem: str, names):
    if names:
        raise UserError(f"the weights in {path} do not fit its config: {len(names)} {problem} ({', '.join(names[:3])}{', …' * (len(names) > 3)}): "
                        "download or save the model again")


def load_with_transformers(name, dtype: torch.dtype, trust_remote_code: bool = False):
    """transformers' own model, on the CPU in evaluation mode; .gguf weights dequantised. Arguments and errors as in load_model."""
    import transformers

    path, options = _locate(name), {}
    if path.suffix == ".gguf":
        if missing := [package for package in ("gguf", "accelerate") if not importlib.util.find_spec(package)]:
            raise UserError(f"{path} needs the package {missing[0]}: pip install miniplm[gguf]")
        options["gguf_file"] = path.name
        if hasattr(transformers, "GgufConfig"):  # newer versions would otherwise keep them quantised where they have a kernel for it
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _quiet_transformers():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path if path.is_dir() else path.parent, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, **options)
    except Exception as error:  # transformers raises anything, from KeyError to OSError
        raise UserError(f"transformers cannot load {path}: {_one_line(error)}") from error
    _refuse_tensors(path, MISSING, sorted(info["missing_keys"]))
    _refuse_tensors(path, OTHER_SHAPE, sorted(name for name, *_ in info["mismatched_keys"]))
    return model.eval()


@contextlib.contextmanager
def _quiet_transformers():
    """Without its progress bars and reports: what they would say comes in the one line of an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _locate(name) -> Path:
    """The folder or .gguf file that a model's name stands for; a Hugging Face id is downloaded (or found in the cache)."""
    path = Path(latest_checkpoint(name))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise UserError(f"model {name} is a file: give a folder, a .gguf file or a Hugging Face id")
    if path.suffix == ".gguf" or path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise UserError(f"model {name} does not exist")
    return _download(str(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        # Weights lie at the top of a repository; below are copies in other formats.
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"],
                                      ignore_patterns=["*/*", "consolidated*"]))
    except (HTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError) as error:
        raise UserError(f"model {name} is neither a local folder nor a Hugging Face model that can be reached: {_one_line(error)}") from error


def _read_config(folder: Path, trust_remote_code: bool):
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json: give a model's folder")
    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises anything, from KeyError to OSError
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return "it comes with code of its own: set trust_remote_code if you trust it"
    return text[:300]


def choose_device(device: str) -> torch.device:
    """"auto" is the GPU if there is one; UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is not known: give auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device!r} is not there, torch sees {torch.cuda.device_count()} GPUs: give --device cpu or another")
    return chosen


def choose_dtype(dtype: str, device) -> torch.dtype:
    """"auto" is bfloat16 on a GPU and float32 on the CPU."""
    if dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, dtype)
