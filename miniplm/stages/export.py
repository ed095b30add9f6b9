"""Stage 6, export: a checkpoint → a Hugging Face folder with a model card.

The folder is what `AutoModelForCausalLM`, `AutoTokenizer`, text-generation servers and lm-eval open as it is.
All that the card says comes from the manifests: training output → corpus → selection and scores. What in them
comes from data (names of domains, sources, models) is escaped.
"""

import dataclasses
import re
import sys
from pathlib import Path

import torch

from ..config import ExportConfig
from ..data.tokenizer import load_tokenizer, save_tokenizer
from ..models.decoder import Decoder
from ..models.loading import load_model, model_hash
from ..runtime.artifacts import MANIFEST, open_output
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, atomic_write, fingerprint, read_json, write_json
from ..training.checkpoints import read_training_output, training_output
from ..training.metrics import latest_figures

MAX_DOMAINS = 40  # lines of the card's table; a corpus can have thousands of domains
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
CITATION = """@inproceedings{gu2025miniplm,
  title     = {{MiniPLM}: Knowledge Distillation for Pre-Training Language Models},
  author    = {Gu, Yuxian and Zhou, Hao and Meng, Fandong and Zhou, Jie and Huang, Minlie},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2410.17215}
}"""


def export(config: ExportConfig) -> None:
    """Write the folder, whole or not at all, and upload it if asked to.

    An output folder that holds an equal export is left alone (and uploaded if asked to).

    Raises:
        UserError: no whole checkpoint of a training output; an evaluation of other weights; weights that are
            not finite in config.dtype; another folder in the way; a failed upload.
    """
    found, manifest = read_training_output(config.checkpoint)
    checkpoint, state = found.folder, dataclasses.asdict(found.state)
    evaluation = _read_evaluation(config.evaluation, checkpoint) if config.evaluation else None
    output = Path(config.output)
    name = config.name or output.resolve().name
    identity = {
        "checkpoint": found.fingerprint,
        "training": fingerprint(manifest),
        "dtype": config.dtype,
        "name": name,
        "license": config.license,
        "language": list(config.language),
        "datasets": list(config.datasets),
        "evaluation": fingerprint(evaluation),
    }
    facts = {
        "manifest": manifest,
        "state": state,
        "losses": latest_figures(training_output(checkpoint), ("loss", "eval_loss"), state["step"]),
        "evaluation": evaluation,
    }
    occupied = output.is_file() or (output.is_dir() and any(output.iterdir()))
    if occupied and open_output(output, "export", identity):
        print(f"export {output} is complete, nothing to do")
    else:
        with atomic_folder(output) as folder:
            _write_model(checkpoint, config.dtype, folder)
            (folder / "README.md").write_text(
                model_card(config, name, output.resolve().name, read_json(folder / "config.json"), facts),
                encoding="utf-8",
            )
            write_json(folder / MANIFEST, {"stage": "export", "complete": True, "identity": identity})
        print(f"exported {checkpoint} to {output} ({config.dtype})")
    if config.push_to_hub:
        _push(
            config,
            output,
            lambda repository: model_card(config, name, repository, read_json(output / "config.json"), facts),
        )


def _read_evaluation(path, checkpoint: Path) -> dict:
    evaluation = read_json(path)
    if (
        not isinstance(evaluation, dict)
        or not {"weights", "corpus", "source", "loss", "perplexity", "tokens", "domains"} <= evaluation.keys()
    ):
        raise UserError(f"{path} is no evaluation: give a file that `miniplm evaluate --output` wrote")
    if evaluation["weights"] != model_hash(checkpoint):
        raise UserError(
            f"{path} is an evaluation of other weights than those of {checkpoint}: evaluate this checkpoint"
        )
    return evaluation


def _write_model(checkpoint: Path, dtype: str, folder: Path):
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
    if model.config.model_type == "qwen2" and not _cut_alike(folder, tokenizer):
        print(
            "transformers cuts text for any qwen2 model as Qwen2's tokenizer does, the corpus's tokenizer "
            "does otherwise: "
            "the model is written as the Llama model that computes the same",
            file=sys.stderr,
        )
        model = _as_llama(model)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"cannot write {folder}: {error}") from error
    _write_for_transformers_4(folder)
    if not _cut_alike(folder, tokenizer):
        raise UserError(
            f"transformers cuts text for a {model.config.model_type!r} model otherwise than the corpus's "
            f"tokenizer does: "
            "train a model of another model_type (llama, qwen3)"
        )
    eos = tokenizer.eos_token_id
    bos, pad = (eos if found is None else found for found in (tokenizer.bos_token_id, tokenizer.pad_token_id))
    GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad).save_pretrained(folder)


def _write_for_transformers_4(folder: Path):
    """Say in config.json and tokenizer_config.json also by the names of transformers 4 what transformers 5
    renamed.

    Many servers still stand on 4, which takes what it does not find for the default: a RoPE base of 10,000
    gives other logits.
    """
    config = read_json(folder / "config.json")
    rope = dict(config.get("rope_parameters") or {})
    config |= {"torch_dtype": config["dtype"]} | (
        {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    )
    config |= {"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {}
    write_json(folder / "config.json", config)
    settings = {
        key: value
        for key, value in read_json(folder / "tokenizer_config.json").items()
        if key not in ("is_local", "local_files_only")
    }
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def _cut_alike(folder: Path, tokenizer) -> bool:
    """Does AutoTokenizer, which goes by the model's type, cut text as `tokenizer` does?

    transformers 5 builds the tokenizer of a qwen2 folder as Qwen2Tokenizer, with its own rules for cutting
    text into words, out of any vocabulary. The text to compare on holds every token: one that spans what the
    other rules cut apart shows.
    """
    from transformers import AutoTokenizer

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
    head_dim = model.model.layers[0].self_attn.head_dim
    llama = Decoder(
        LlamaConfig(**{name: getattr(config, name) for name in kept}, head_dim=head_dim, attention_bias=True)
    )
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("o_proj.bias") for name in missing)  # which start at 0
    return llama.to(model.head_weight.dtype)


def _push(config: ExportConfig, folder: Path, card):
    """Upload the folder; the card, a function of the repository's id, then says how to load the model from
    there."""
    from huggingface_hub import HfApi

    def ask(method, *args, **settings):
        try:
            return method(*args, **settings)
        except (
            Exception
        ) as error:  # the HTTP library's errors too, which is another one from version to version
            raise UserError(
                f"{folder} is complete, but could not be uploaded to {config.push_to_hub} "
                f"({' '.join(str(error).split())[:300]}): "
                "look at the name and the network, log in with `hf auth login`, and run the command again"
            ) from error

    api = HfApi()
    repository = ask(api.create_repo, config.push_to_hub, private=config.private, exist_ok=True).repo_id
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card(repository), encoding="utf-8")
    ask(
        api.upload_folder,
        repo_id=repository,
        folder_path=folder,
        ignore_patterns=[MANIFEST],
        commit_message="Upload model",
    )
    print(f"uploaded to {api.endpoint}/{repository}")


# ---- the model card ----


def model_card(config: ExportConfig, name: str, location: str, architecture: dict, facts: dict) -> str:
    """The README.md: YAML front matter, then Markdown.

    Args:
        name: the model's name. location: what from_pretrained loads it from.
        architecture: config.json. facts: {"manifest": of the training output, "state": of the checkpoint,
            "losses", "evaluation": or None}.
    """
    from huggingface_hub import ModelCardData

    corpus = facts["manifest"].get("corpus", {})
    source, rule = corpus.get("source", ""), corpus.get("selection", {}).get("rule", {})
    distilled, identity = bool(rule) and "random_seed" not in rule, facts["manifest"]["identity"]
    data = ModelCardData(
        library_name="transformers",
        license=config.license,
        datasets=list(config.datasets) or ([source] if HUB_ID.fullmatch(source) else None),
        language=list(config.language),
        metrics=["perplexity"],
        pipeline_tag="text-generation",
        tags=[
            "pretraining",
            *(
                ["miniplm", "knowledge-distillation", "data-selection"]
                if distilled
                else ["knowledge-distillation"]
                if "teacher" in identity
                else []
            ),
        ],
    )
    method = (
        " on text that a larger model found worth learning: MiniPLM's Difference Sampling "
        "([paper](https://arxiv.org/abs/2410.17215))"
        if distilled
        else ""
    )
    start = "trained further from other weights" if identity.get("init_from") else "pre-trained from scratch"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_escape(name)}",
        f"A causal language model, {start}{method}.",
        "## Training",
        _table(["", ""], _training_rows(architecture, facts, distilled)),
        *_evaluation_section(facts["evaluation"], corpus),
        "## Use",
        "With the path of this folder, or its id on the Hugging Face Hub:",
        f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({location!r})
tokenizer = AutoTokenizer.from_pretrained({location!r})
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```""",
        "This is a base model: it continues text, has not been tuned to follow instructions, and repeats "
        "what its corpus holds, errors and bias too.",
    ]
    if distilled:
        parts += ["## Citation", "The method:", f"```bibtex\n{CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _training_rows(architecture: dict, facts: dict, distilled: bool) -> list[tuple[str, str]]:
    """The card's table of what was trained on what, cells in Markdown."""
    manifest, state = facts["manifest"], facts["state"]
    identity, corpus, optimizer = (
        manifest["identity"],
        manifest.get("corpus"),
        manifest["identity"]["optimizer"],
    )
    heads, kv_heads = architecture.get("num_attention_heads"), architecture.get("num_key_value_heads")
    sizes = {
        "num_hidden_layers": "layers",
        "hidden_size": "wide",
        "intermediate_size": "wide feed-forward",
        "vocab_size": "ids",
    }
    shape = [f"{architecture[key]:,} {label}" for key, label in sizes.items() if architecture.get(key)]
    shape += [f"{heads} heads ({kv_heads or heads} for keys and values)"] if heads else []
    shape += ["tied embeddings" if architecture.get("tie_word_embeddings") else "untied embeddings"]
    rows = [
        ("Architecture", f"{_escape((architecture.get('architectures') or ['?'])[0])}: {', '.join(shape)}")
    ]
    if "parameters" in manifest:
        rows.append(("Parameters", f"{manifest['parameters']:,}"))
    if corpus is None:
        rows.append(("Corpus", f"fingerprint {identity['corpus']}"))
    else:
        rows.append(
            (
                "Corpus",
                f"{_escape(corpus['source'])}: {corpus['rows']:,} chunks of at most "
                f"{corpus['max_length'] + 1:,} tokens, "
                f"{corpus['tokens']:,} tokens in {_count(len(corpus['domains']), 'domain')}",
            )
        )
    if corpus and "selection" in corpus:
        selection = corpus["selection"]
        models = {
            role: model
            for scores in corpus["scores"]
            for role, model in scores.items()
            if role in ("teacher", "reference")
        }
        if distilled:
            rows += [
                ("Teacher", _model(models["teacher"])),
                ("Reference model", _model(models["reference"])),
                (
                    "Score",
                    "mean log-probability per token under the teacher minus that under the reference model",
                ),
            ]
        total, total_tokens = (
            selection["kept"] + selection["dropped"],
            selection["kept_tokens"] + selection["dropped_tokens"],
        )
        rows.append(
            (
                "Selection",
                f"{_rule(selection['rule'])}: {selection['kept']:,} of {total:,} chunks, "
                f"{selection['kept_tokens']:,} of {total_tokens:,} tokens",
            )
        )
    end = (
        ""
        if manifest.get("complete") and state["step"] == identity["steps"]
        else f" of {identity['steps']:,} planned: the run had not ended here"
    )
    if "teacher" in identity:
        name = (
            _model(manifest["teacher"])
            if "teacher" in manifest
            else f"a model with the hash {identity['teacher']}"
        )
        rows.append(
            (
                "Loss",
                f"{1 - identity['alpha']:g} × cross-entropy + {identity['alpha']:g} × KL divergence from "
                f"the full distribution "
                f"of {name} at temperature {identity['temperature']:g} (Vanilla KD)",
            )
        )
    tokens = f"{state['tokens']:,}" + (
        f" ({state['tokens'] / (corpus['tokens'] - corpus['rows']):.2f} passes over the corpus)"
        if corpus
        else ""
    )
    rows += [
        ("Training tokens", tokens),
        ("Steps", f"{state['step']:,}{end}"),
        ("Tokens per step", f"{identity['batch_tokens']:,}"),
        (
            "Optimizer",
            f"AdamW, betas {optimizer['betas'][0]} and {optimizer['betas'][1]}, epsilon {optimizer['eps']}, "
            f"weight decay {optimizer['weight_decay']}, gradients clipped to norm "
            f"{optimizer['max_grad_norm']}",
        ),
        (
            "Learning rate",
            f"{optimizer['warmup_steps']:,} steps of linear warm-up to {optimizer['lr']}, then a cosine to "
            f"{optimizer['lr'] * optimizer['min_lr_ratio']:.3g} at step {identity['steps']:,}",
        ),
        ("Data order", "shuffled in every epoch" if identity["shuffle"] else "in corpus order"),
        (
            "Attention",
            "within each document" if identity["document_mask"] else "across the documents of a chunk",
        ),
        ("Computed in", f"{identity['dtype']}, float32 master weights"),
        ("Seed", str(identity["seed"])),
    ]
    for key, label in [("loss", "Training loss"), ("eval_loss", "Held-out loss")]:
        if key in facts["losses"]:
            step, loss = facts["losses"][key]
            rows.append(
                (label, "not finite" if loss is None else f"{loss:.4f} nats per token at step {step:,}")
            )
    return rows


def _evaluation_section(evaluation: dict | None, corpus: dict) -> list[str]:
    if evaluation is None:
        return []
    seen = evaluation["corpus"] in (corpus.get("fingerprint"), corpus.get("parent"))
    text = "the text that it was trained on" if seen else "held-out text"

    def figure(value, digits):
        return "not finite" if value is None else f"{value:,.{digits}f}"

    def row(label, figures):
        empty = not figures["tokens"]
        return [
            label,
            f"{figures['tokens']:,}",
            *(
                "–" if empty else figure(figures[key], digits)
                for key, digits in (("loss", 4), ("perplexity", 2))
            ),
        ]

    largest = sorted(evaluation["domains"].items(), key=lambda item: -item[1]["tokens"])
    rows = [row(_escape(name), figures) for name, figures in largest[:MAX_DOMAINS]]
    if len(largest) > MAX_DOMAINS:
        rows.append([f"{len(largest) - MAX_DOMAINS:,} smaller domains", "", "", ""])
    rows.append(row("**all**", evaluation))
    return [
        "## Evaluation",
        f"Loss on {text}: {_escape(evaluation['source'])}, corpus fingerprint "
        f"{_escape(evaluation['corpus'])}.",
        _table(["domain", "tokens", "loss (nats per token)", "perplexity"], rows),
    ]


def _rule(rule: dict) -> str:
    each = " of each domain" if rule.get("per_domain") else ""
    if "random_seed" in rule:
        kept = (
            f"a share of {rule['ratio']}"
            if "ratio" in rule
            else f"as many as fit into {rule['token_budget']:,} tokens"
        )
        return (
            f"{kept}{each}, chosen at random (seed {rule['random_seed']}; the control of a selection by "
            f"score)"
        )
    if "ratio" in rule:
        return f"the share of {rule['ratio']}{each} with the highest scores"
    if "token_budget" in rule:
        return f"those with the highest scores{each} that fit into {rule['token_budget']:,} tokens"
    return f"those with a score of at least {rule['threshold']}"


def _model(name: str) -> str:
    """A model's display name; a Hugging Face id (paths were cut to their last part) as a link."""
    return f"[{_escape(name)}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else _escape(name)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _table(header: list[str], rows) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def _escape(text: str) -> str:
    """Any text as inline Markdown that shows it: no markup, HTML, link, mention or line break comes of it."""
    text = "".join(letter if letter.isprintable() else "�" for letter in " ".join(str(text).split()))
    return re.sub(r"[\\`*_{}\[\]<>()#+!|&~$@:^=]|(?<=www)\.", r"\\\g<0>", text, flags=re.IGNORECASE)
