"""GGUF files of Qwen2 and Llama students, for llama.cpp and what is built on it.

One file holds the weights, the architecture and the tokenizer. llama.cpp cuts text into words by rules of its
own, one set for each name in `tokenizer.ggml.pre`: a tokenizer whose rules it does not know is refused, since
the model would see other tokens than it was trained on. The one difference that stays: llama.cpp does not
normalise text to NFC, as Qwen's tokenizer does.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from ..runtime.errors import UserError
from ..runtime.files import atomic_write
from .decoder import Decoder

Encoding: TypeAlias = Literal["f16", "q8_0"]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2_WORDS = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# llama.cpp's name → how the text is cut before the merges, and whether a word that is a token skips them
WORD_RULES: dict[str, tuple[list[tuple[str, object]], bool]] = {
    "gpt-2": ([("ByteLevel", True)], False),
    "smollm": ([("Digits", True), ("ByteLevel", True)], False),
    "qwen2": ([("Split", QWEN2_WORDS), ("ByteLevel", False)], False),
    "llama-bpe": ([("Split", LLAMA3_WORDS), ("ByteLevel", False)], True),
}
MAX_FLOAT16 = 65_504.0


def write_gguf(model: Decoder, tokenizer: Any, path: str | Path, encoding: Encoding, name: str) -> None:
    """Write a model and its tokenizer to one GGUF file.

    Args:
        model: a Qwen2 or Llama decoder.
        tokenizer: transformers' PreTrainedTokenizerFast of the model.
        path: the file; written whole or not at all.
        encoding: of the matrices. f16: half precision. q8_0: 8 bits and a scale for every 32 weights of a
            row, where the row is a multiple of 32, else half precision. Vectors (norms, biases) are float32.
        name: the model's name in the file.
    Raises:
        UserError: the package gguf is missing, llama.cpp cannot compute the model or cut words as the
            tokenizer does, or a weight is too large for float16.
    """
    if not importlib.util.find_spec("gguf"):
        raise UserError(f"{path} needs the package gguf: pip install miniplm[gguf]")
    import gguf

    if reason := _reason_against(model):
        raise UserError(f"a .gguf file of this model cannot be written: {reason}")
    vocabulary = _vocabulary(tokenizer, model.config.vocab_size)  # refused before anything is written
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, model.config.model_type)
        writer.add_name(name)
        _add_architecture(writer, model, encoding)
        _add_tokenizer(writer, vocabulary, tokenizer, model.config)
        architecture = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}
        names = gguf.get_tensor_name_map(
            architecture[model.config.model_type], model.config.num_hidden_layers
        )
        for parameter, tensor in model.state_dict().items():
            found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
            assert found, parameter
            _add_tensor(writer, found, _reordered(parameter, tensor, model.config), encoding)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _reason_against(model: Decoder) -> str | None:
    """Why llama.cpp, or a reader of its files, would not compute this model; None if it does."""
    config = model.config
    if config.model_type not in ("qwen2", "llama"):
        return f"its type is {config.model_type!r}, not 'qwen2' or 'llama'"
    if config.rope_parameters["rope_type"] != "default":
        return f"its rope type is {config.rope_parameters['rope_type']!r}, not 'default'"
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        return "it is a Llama with biases, which transformers' reader of the file drops"
    return None


# ---- the architecture ----


def _add_architecture(writer: Any, model: Decoder, encoding: Encoding) -> None:
    import gguf

    layers: Any = model.model.layers
    config, head_dim = model.config, layers[0].self_attn.head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    file_type = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_type[encoding])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _reordered(parameter: str, tensor: Tensor, config: Any) -> Tensor:
    """The rows of a Llama's q and k as llama.cpp rotates them: pairs side by side, where transformers has the
    halves of a head one after the other."""
    if config.model_type != "llama" or not parameter.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in parameter else config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tensor(writer: Any, name: str, tensor: Tensor, encoding: Encoding) -> None:
    import gguf

    values = tensor.detach().float().cpu().contiguous().numpy()
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
    if values.ndim == 1:
        writer.add_tensor(name, values)
    elif encoding == "q8_0" and values.shape[-1] % block == 0:
        quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    elif not np.abs(values).max() <= MAX_FLOAT16:
        raise UserError(f"{name} has weights that float16 does not hold: a .gguf file cannot be written")
    else:
        writer.add_tensor(name, values.astype(np.float16))


# ---- the tokenizer ----


def _vocabulary(tokenizer: Any, rows: int) -> dict:
    """The tokenizer as llama.cpp wants it: {"tokens": of every row of the embedding, "types", "merges",
    "rules": the name of its way of cutting words}."""
    import gguf

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} ids, the model {rows:,}: they do not belong together"
        )
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for token, index in content["model"].get("vocab", {}).items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"].get("merges", [])
    ]
    return {"tokens": tokens, "types": types, "merges": merges, "rules": _word_rules(content)}


def _word_rules(content: dict) -> str:
    """llama.cpp's name for the way in which a tokenizer.json cuts text into words; UserError if it has
    none."""
    model, normalizer = content["model"], (content["normalizer"] or {}).get("type")
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer not in (None, "NFC"):
        kind = model["type"]
        kind += " with byte fallback" if model.get("byte_fallback") else ""
        kind += f" on text normalised by {normalizer}" if normalizer else ""
        raise UserError(
            f"a .gguf file takes byte-level BPE tokenizers, such as Qwen's, Llama 3's and GPT-2's; this one "
            f"is {kind}"
        )
    steps = _steps(content["pre_tokenizer"])
    for name, rules in WORD_RULES.items():
        if rules == (steps, bool(model.get("ignore_merges"))):
            return name
    raise UserError(
        "llama.cpp has no rules for words like this tokenizer's: a .gguf file would give the model other "
        f"tokens than it was trained on (those of {', '.join(WORD_RULES)} are known)"
    )


def _steps(pre_tokenizer: dict | None) -> list[tuple[str, object]]:
    """A pre-tokenizer of a tokenizer.json as pairs of a step and what matters of it."""
    pre_tokenizer = pre_tokenizer or {}
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [(kind, pre_tokenizer["use_regex"])]
    if kind == "Digits":
        return [(kind, pre_tokenizer["individual_digits"])]
    isolated = pre_tokenizer.get("behavior") == "Isolated" and not pre_tokenizer.get("invert")
    if kind == "Split" and isolated:
        return [(kind, pre_tokenizer["pattern"].get("Regex"))]
    return [("unknown", pre_tokenizer)]


def _add_tokenizer(writer: Any, vocabulary: dict, tokenizer: Any, config: Any) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary["rules"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    # All of them are said: left out, llama.cpp takes id 11 for BOS and EOS, and some rules begin with a BOS.
    eos = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
