"""Stage 6, export: a checkpoint → a Hugging Face folder with a model card.

The folder is what `AutoModelForCausalLM`, `AutoTokenizer`, text-generation servers and lm-eval open as it is,
and a manifest that holds a hash of every other file in it. With `gguf` there is a file for llama.cpp too.
"""

from pathlib import Path
from typing import Any

import torch

from ..analysis.evaluation import Evaluation, read_evaluation
from ..analysis.hub_folders import CARD, is_complete, upload, write_manifest
from ..analysis.model_card import CardFacts, model_card
from ..analysis.provenance import Provenance, read_provenance
from ..config import ExportConfig
from ..data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_errors
from ..models.decoder import Decoder
from ..models.gguf_file import Encoding, write_gguf
from ..models.loading import load_model, model_hash
from ..runtime.artifacts import MANIFEST
from ..runtime.errors import UserError, system_error
from ..runtime.files import atomic_folder, fingerprint, read_json, write_json
from ..runtime.progress import note
from ..runtime.text import printable
from ..training.checkpoints import metrics_file, read_training_output, training_output
from ..training.metrics import latest_figures

# What is in every export, whatever its weights are written as.
ALWAYS_THERE = (CARD, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def export(config: ExportConfig) -> None:
    """Write the folder, whole or not at all, and upload it if asked to.

    An output folder that holds an equal export is left alone (and uploaded if asked to).

    Raises:
        UserError: no whole checkpoint of a training output; an evaluation of other weights; weights that are
            not finite in config.dtype; another folder in the way, or an equal export that is damaged; another
            process that writes it; a failed upload.
    """
    checkpoint, manifest = read_training_output(config.checkpoint)
    run, step = training_output(checkpoint.folder), checkpoint.state.step
    provenance = read_provenance(manifest, run / MANIFEST)
    evaluation = _evaluation_of(checkpoint.folder, config.evaluation) if config.evaluation else None
    output = Path(config.output)
    name = config.name or output.resolve().name
    identity = {
        "checkpoint": checkpoint.fingerprint,
        "training": fingerprint({key: value for key, value in manifest.items() if key != "checksum"}),
        "dtype": config.dtype,
        "name": name,
        "license": config.license,
        "language": list(config.language),
        "datasets": list(config.datasets),
        "evaluation": evaluation.fingerprint if evaluation else fingerprint(None),
    }
    if config.gguf:
        identity["gguf"] = config.gguf
    losses = _losses(run, provenance, step, checkpoint.state.last_logged_step)

    def card(folder: Path, location: str) -> str:
        architecture = read_json(folder / "config.json")
        tokens = checkpoint.state.tokens
        facts = CardFacts(name, architecture, provenance, step, tokens, losses, evaluation)
        return model_card(config, facts, location)

    if is_complete(output, "export", identity, ALWAYS_THERE, _visible_damage):
        print(printable(f"export {output} is complete, nothing to do"))
    else:
        with atomic_folder(output) as folder:
            _write_model(checkpoint.folder, config.dtype, folder)
            if config.gguf:
                _write_gguf(checkpoint.folder, folder, config.gguf, name)
            (folder / CARD).write_text(card(folder, output.resolve().name), encoding="utf-8")
            write_manifest(folder, "export", identity)
        print(printable(f"exported {checkpoint.folder} to {output} ({config.dtype})"))
    if config.push_to_hub:
        upload(config.push_to_hub, config.private, output, lambda repository: card(output, repository))


def _evaluation_of(checkpoint: Path, path: str) -> Evaluation:
    evaluation = read_evaluation(path)
    if evaluation.weights != model_hash(checkpoint):
        raise UserError(
            f"{path} is an evaluation of other weights than those of {checkpoint}: evaluate this checkpoint"
        )
    return evaluation


def _losses(run: Path, provenance: Provenance, step: int, logged: int) -> dict[str, tuple[int, float | None]]:
    """{"loss", "eval_loss": (step, nats per token or None where not finite)}: the latest of each up to
    `step`. At the end of a run its manifest holds them too.

    Args:
        logged: the last step before it that the checkpoint knows a line of.
    """
    losses = latest_figures(run, ("loss", "eval_loss"), step, logged)
    if not (provenance.complete and step == provenance.identity.steps):
        if not losses and logged:
            raise UserError(
                f"{metrics_file(run)} has lost its lines up to step {logged:,}: restore it, or export the "
                f"end of the run"
            )
        return losses
    for key in provenance.model_fields_set & {"loss", "eval_loss"}:
        recorded, (found_at, found) = getattr(provenance, key), losses.get(key, (0, None))
        if found_at == step and found != recorded:
            raise UserError(
                f"{metrics_file(run)} and {MANIFEST} beside it hold another {key} of step {step:,}: restore "
                f"them, or export an earlier checkpoint"
            )
        if recorded is not None:
            losses[key] = step, recorded
    return losses


# ---- the folder as a whole ----


def _visible_damage(folder: Path) -> str | None:
    """As _damage, of an export from before the manifest held hashes: what is missing or cut."""
    from safetensors import SafetensorError, safe_open

    for name in ALWAYS_THERE:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if name.endswith(".json"):
            try:
                read_json(folder / name)
            except UserError:
                return f"{name} is not as it was written"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return "model.safetensors is missing"
    for path in weights:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return f"{path.name} is not as it was written"
    return None


# ---- what is in it ----


def _write_model(checkpoint: Path, dtype: str, folder: Path) -> None:
    """config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    model = load_model(checkpoint, getattr(torch, dtype))
    if broken := [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]:
        raise UserError(
            f"{len(broken)} tensors of {checkpoint} are not finite in {dtype} ({broken[0]}): export an "
            f"earlier checkpoint or another dtype"
        )
    tokenizer = load_tokenizer(str(checkpoint))
    tokenizer.model_max_length = min(
        tokenizer.model_max_length,
        getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length,
    )
    save_tokenizer(tokenizer, folder)
    model.config.save_pretrained(folder)
    is_qwen2 = model.config.model_type == "qwen2"
    if isinstance(model, Decoder) and is_qwen2 and not _cut_alike(folder, tokenizer):
        note(
            "transformers cuts text for any qwen2 model as Qwen2's tokenizer does, the corpus's tokenizer "
            "does otherwise: the model is written as the Llama model that computes the same"
        )
        model = _as_llama(model)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how the library reports a full disk
        raise system_error(error, folder) or error from None
    _write_for_transformers_4(folder)
    if not _cut_alike(folder, tokenizer):
        raise UserError(
            f"transformers cuts text for a {model.config.model_type!r} model differently from the corpus's "
            f"tokenizer: train a model of another model_type (llama, qwen3)"
        )
    eos = tokenizer.eos_token_id
    bos, pad = (eos if found is None else found for found in (tokenizer.bos_token_id, tokenizer.pad_token_id))
    GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad).save_pretrained(folder)


def _write_gguf(checkpoint: Path, folder: Path, encoding: Encoding, name: str) -> None:
    """The .gguf file: of the checkpoint, for there is no need in it to write Qwen2 as Llama."""
    model = load_model(checkpoint)
    if not isinstance(model, Decoder):
        raise UserError(
            f"a .gguf file of a {model.config.model_type!r} model cannot be written: leave out gguf"
        )
    write_gguf(model, load_tokenizer(str(checkpoint)), folder / f"model-{encoding}.gguf", encoding, name)


def _write_for_transformers_4(folder: Path) -> None:
    """Say in config.json and tokenizer_config.json also by the names of transformers 4 what transformers 5
    renamed.

    Many servers still stand on 4, which takes what it does not find for the default: a RoPE base of 10,000
    gives other logits.
    """
    config = read_json(folder / "config.json")
    config["torch_dtype"] = config["dtype"]
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    write_json(folder / "config.json", config)
    settings = read_json(folder / "tokenizer_config.json")
    for key in ("is_local", "local_files_only"):  # of this machine
        settings.pop(key, None)
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def _cut_alike(folder: Path, tokenizer: Any) -> bool:
    """Does AutoTokenizer, which goes by the model's type, cut text as `tokenizer` does?

    transformers 5 builds the tokenizer of a qwen2 folder as Qwen2Tokenizer, with its own rules for cutting
    text into words, out of any vocabulary. The text to compare on holds every token: one that spans what the
    other rules cut apart shows.
    """
    from transformers import AutoTokenizer

    with tokenizer_errors(tokenizer.name_or_path):
        text = tokenizer.decode(range(len(tokenizer))) + " It's 2024:\n\n  e\u0301 DON'T"
        found = AutoTokenizer.from_pretrained(folder)
        return found.backend_tokenizer.encode(text).ids == tokenizer.backend_tokenizer.encode(text).ids


def _as_llama(model: Decoder) -> Decoder:
    """The same function under the Llama architecture: with attention_bias it has Qwen2's biases of q, k and
    v, and one of o, which is 0."""
    from transformers import LlamaConfig

    config = model.config
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "tie_word_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
    )
    weights = model.state_dict()
    head_dim = len(weights["model.layers.0.self_attn.q_proj.weight"]) // config.num_attention_heads
    llama = Decoder(
        LlamaConfig(**{name: getattr(config, name) for name in kept}, head_dim=head_dim, attention_bias=True)
    )
    missing, unexpected = llama.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("o_proj.bias") for name in missing)  # which start at 0
    return llama.to(model.head_weight.dtype)
