"""The model card of an export: YAML front matter, then what was trained on what, and how well it does.

The text is in model_card.md.jinja. All that it says comes from manifests; what in them comes from data (names
of domains, sources, models) is escaped here, so the template gets Markdown only.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config import ExportConfig
from .evaluation import Evaluation, Losses
from .markdown import escape
from .provenance import Provenance, Rule, RunIdentity, TrainingCorpus

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MAX_DOMAINS = 40  # lines of the card's table; a corpus can have thousands of domains
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
SIZES = {  # key of config.json → what is told of it
    "num_hidden_layers": "layers",
    "hidden_size": "wide",
    "intermediate_size": "wide feed-forward",
    "vocab_size": "ids",
}

TEACHER, REFERENCE = (
    f"mean log-probability per token under the {who}" for who in ("teacher", "reference model")
)
SCORES = {  # what chunks were compared by
    "difference": f"{TEACHER} minus that under the reference model",
    "ratio": f"{REFERENCE} divided by that under the teacher",
    "normalised": f"{TEACHER} minus that under the reference model, each standardised within the domain",
    "teacher": TEACHER,
    "reference": REFERENCE,
}

PROXIES = {  # what scores were predicted by
    "ngram": "a linear model of hashed n-grams",
    "transformer": "a small transformer",
}
TOKEN_RULES = {  # the tokens that count in the loss
    "difference": "the highest log-probability under {teacher} minus that under {reference}",
    "teacher_loss": "the lowest log-probability under {teacher}",
    "reference_loss": "the lowest log-probability under {reference}",
}

Row = tuple[str, str]  # (label, cell in Markdown) of the card's table of what was trained on what


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of a checkpoint.

    Attributes:
        name: the model's.
        architecture: its config.json.
        provenance: the manifest of its training output.
        step, tokens: how far its training had come.
        losses: {"loss", "eval_loss": (step, nats per token, None where not finite)} as far as there are any.
    """

    name: str
    architecture: dict
    provenance: Provenance
    step: int
    tokens: int
    losses: dict[str, tuple[int, float | None]]
    evaluation: Evaluation | None


class _FrontMatter(ModelCardData):
    """The library's own keeps letters beyond ASCII as they are, those that are not seen too."""

    def to_yaml(self, line_break: str | None = None, original_order: list[str] | None = None) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, line_break=line_break).strip()


class _Card(ModelCard):
    card_data_class = _FrontMatter


def model_card(settings: ExportConfig, facts: CardFacts, location: str) -> str:
    """The README.md.

    Args:
        location: what from_pretrained loads the model from.
    """
    run, corpus = facts.provenance, facts.provenance.corpus
    distilled = corpus is not None and corpus.by_score
    card = _Card.from_template(
        _front_matter(settings, run),
        template_path=str(TEMPLATE),
        name=escape(facts.name),
        location=repr(location),
        start="trained further from other weights" if run.identity.init_from else "pre-trained from scratch",
        distilled=distilled,
        training=_training_rows(facts),
        evaluation=_evaluation_section(facts.evaluation, corpus) if facts.evaluation else None,
    )
    return str(card)


def _front_matter(settings: ExportConfig, run: Provenance) -> _FrontMatter:
    tags = ["pretraining"]
    if run.corpus and run.corpus.by_score:
        tags += ["miniplm", "knowledge-distillation", "data-selection"]
    elif run.identity.teacher or (run.corpus and run.corpus.synthesis):
        tags += ["knowledge-distillation"]
    source = run.corpus.source if run.corpus else ""
    return _FrontMatter(
        library_name="transformers",
        license=settings.license,
        datasets=list(settings.datasets) or ([source] if _is_hub_id(source) else None),
        language=list(settings.language),
        metrics=["perplexity"],
        pipeline_tag="text-generation",
        tags=tags,
    )


# ---- what was trained on what ----


def _training_rows(facts: CardFacts) -> list[Row]:
    run = facts.provenance
    rows = [("Architecture", _architecture(facts.architecture))]
    if run.parameters is not None:
        rows.append(("Parameters", f"{run.parameters:,}"))
    if run.corpus is None:
        rows.append(("Corpus", f"fingerprint {escape(run.identity.corpus)}"))
    else:
        rows += corpus_rows(run.corpus)
    if run.identity.teacher:
        rows.append(("Loss", _distillation_loss(run)))
    if tokens := run.identity.tokens:
        models = {"teacher": "the teacher", "reference": "the reference model"}
        names = {role: _model(getattr(run.token_models, role) or word) for role, word in models.items()}
        best = TOKEN_RULES[tokens.rule].format(**names)
        rows.append(("Tokens in the loss", f"the share of {tokens.ratio:g} of each step's with {best}"))
    return [*rows, *_progress_rows(facts), *_setting_rows(run.identity), *_loss_rows(facts.losses)]


def _architecture(config: dict) -> str:
    shape = [f"{config[key]:,} {label}" for key, label in SIZES.items() if _is_size(config.get(key))]
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if _is_size(heads):
        shape.append(f"{heads} heads ({kv_heads if _is_size(kv_heads) else heads} for keys and values)")
    shape.append("tied embeddings" if config.get("tie_word_embeddings") else "untied embeddings")
    return f"{escape((config.get('architectures') or ['?'])[0])}: {', '.join(shape)}"


def _is_size(value: object) -> bool:
    """Some architectures have a list of sizes, one per layer, where most have one number."""
    return type(value) is int and value > 0


def corpus_rows(corpus: TrainingCorpus) -> list[Row]:
    """What the chunks of a corpus are, and how they were chosen."""
    noun = "domain" if len(corpus.domains) == 1 else "domains"
    size = (
        f"{corpus.rows:,} chunks of at most {corpus.max_length + 1:,} tokens, {corpus.tokens:,} tokens in "
        f"{len(corpus.domains):,} {noun}"
    )
    rows = [("Corpus", f"{escape(corpus.source)}: {size}")]
    if corpus.by_score:
        rows += [
            ("Teacher", _model(corpus.scored_by("teacher") or "?")),
            ("Reference model", _model(corpus.scored_by("reference") or "?")),
            ("Score", _score(corpus.selection.rule) if corpus.selection else SCORES["difference"]),
        ]
        if predicted := corpus.predicted:
            rows.append(
                (
                    "Predicted by",
                    f"{PROXIES[predicted.kind]} that was fitted to a sample of scores; Spearman's rank "
                    f"correlation with held-out ones {predicted.spearman:.3f}",
                )
            )
    if synthesis := corpus.synthesis:
        rows.append(
            (
                "Text",
                f"the first {synthesis.prompt_tokens:,} tokens of each chunk, continued by "
                f"{_model(synthesis.teacher)} at temperature {synthesis.temperature:g} and top_p "
                f"{synthesis.top_p:g}",
            )
        )
    if selection := corpus.selection:
        chunks, tokens = selection.kept + selection.dropped, selection.kept_tokens + selection.dropped_tokens
        kept = f"{selection.kept:,} of {chunks:,} chunks, {selection.kept_tokens:,} of {tokens:,} tokens"
        rows.append(("Selection", f"{_rule(selection.rule)}: {kept}"))
    return rows


def _score(rule: Rule) -> str:
    parts = [
        "summed over the tokens" if rule.aggregate == "sum" else "",
        f"the quantile {rule.quantile} over the tokens" if rule.quantile is not None else "",
        "the mean over each document's chunks" if rule.document_scores else "",
    ]
    return SCORES[rule.score] + "".join(f", {part}" for part in parts if part)


def _rule(rule: Rule) -> str:
    each = " of each domain" if rule.per_domain else ""
    if rule.random_seed is not None:
        if rule.ratio is not None:
            kept = f"a share of {rule.ratio}"
        else:
            kept = f"as many as fit into {rule.token_budget:,} tokens"
        how = f"chosen at random (seed {rule.random_seed}; the control of a selection by score)"
        return f"{kept}{each}, {how}{_of_which(rule)}"
    highest = "with the highest scores"
    if rule.temperature:
        highest = f"drawn by their scores at the temperature {rule.temperature}"
    if rule.ratio is not None:
        return f"the share of {rule.ratio}{each} {highest}{_of_which(rule)}"
    if rule.token_budget is not None:
        return f"those {highest}{each} that fit into {rule.token_budget:,} tokens{_of_which(rule)}"
    return f"those with a score of at least {rule.threshold}{_of_which(rule)}"


def _of_which(rule: Rule) -> str:
    """The rest of a rule, after a comma."""
    shares = ", ".join(f"{escape(name)} {share:g}" for name, share in rule.domain_shares.items())
    parts = [
        f"in shares of the domains ({shares})" if shares else "",
        f"of chunks of at least {rule.min_tokens:,} tokens" if rule.min_tokens is not None else "",
        f"at most {rule.max_repeats:,} of each group of near-duplicates" if rule.max_repeats else "",
        {"score": "the best first", "random": "in random order"}.get(rule.order, ""),
    ]
    return "".join(f", {part}" for part in parts if part)


def _distillation_loss(run: Provenance) -> str:
    alpha, temperature = run.identity.alpha, run.identity.temperature
    assert alpha is not None and temperature is not None  # the schema sees to it
    if run.teacher is None:
        teacher = f"a model with the hash {escape(run.identity.teacher)}"
    else:
        teacher = _model(run.teacher)
    return (
        f"{1 - alpha:g} × cross-entropy + {alpha:g} × KL divergence from the full distribution of {teacher} "
        f"at temperature {temperature:g} (Vanilla KD)"
    )


def _progress_rows(facts: CardFacts) -> list[Row]:
    run, tokens, steps = facts.provenance, f"{facts.tokens:,}", f"{facts.step:,}"
    if run.corpus and run.corpus.tokens > run.corpus.rows:  # the first token of a chunk is not predicted
        passes = facts.tokens / (run.corpus.tokens - run.corpus.rows)
        tokens += f" ({passes:.2f} passes over the corpus)"
    if not (run.complete and facts.step == run.identity.steps):
        steps += f" of {run.identity.steps:,} planned: the run had not ended here"
    return [("Training tokens", tokens), ("Steps", steps)]


def _setting_rows(identity: RunIdentity) -> list[Row]:
    optimizer = identity.optimizer
    return [
        ("Tokens per step", f"{identity.batch_tokens:,}"),
        (
            "Optimizer",
            f"AdamW, betas {optimizer.betas[0]} and {optimizer.betas[1]}, epsilon {optimizer.eps}, "
            f"weight decay {optimizer.weight_decay}, gradients clipped to norm {optimizer.max_grad_norm}",
        ),
        (
            "Learning rate",
            f"{optimizer.warmup_steps:,} steps of linear warm-up to {optimizer.lr}, then a cosine to "
            f"{optimizer.lr * optimizer.min_lr_ratio:.3g} at step {identity.steps:,}",
        ),
        ("Data order", "shuffled in every epoch" if identity.shuffle else "in corpus order"),
        (
            "Attention",
            "within each document" if identity.document_mask else "across the documents of a chunk",
        ),
        ("Computed in", f"{escape(identity.dtype)}, float32 master weights"),
        ("Seed", str(identity.seed)),
    ]


def _loss_rows(losses: dict[str, tuple[int, float | None]]) -> list[Row]:
    rows = []
    for key, label in [("loss", "Training loss"), ("eval_loss", "Held-out loss")]:
        if key in losses:
            step, loss = losses[key]
            rows.append(
                (label, "not finite" if loss is None else f"{loss:.4f} nats per token at step {step:,}")
            )
    return rows


def _model(name: str) -> str:
    """A model's display name; a Hugging Face id (paths were cut to their last part) as a link."""
    return f"[{escape(name)}](https://huggingface.co/{name})" if _is_hub_id(name) else escape(name)


def _is_hub_id(name: str) -> bool:
    if not HUB_ID.fullmatch(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---- how well it does ----


def _evaluation_section(evaluation: Evaluation, corpus: TrainingCorpus | None) -> dict:
    """What the template says of an evaluation."""
    seen = corpus is not None and evaluation.corpus in (corpus.fingerprint, corpus.parent)
    largest = sorted(evaluation.domains.items(), key=lambda item: -item[1].tokens)
    rows = [_losses_row(escape(name), losses) for name, losses in largest[:MAX_DOMAINS]]
    if len(largest) > MAX_DOMAINS:
        rows.append([f"{len(largest) - MAX_DOMAINS:,} smaller domains", "", "", ""])
    rows.append(_losses_row("**all**", evaluation))
    return {
        "text": "the text that it was trained on" if seen else "held-out text",
        "source": escape(evaluation.source),
        "corpus": escape(evaluation.corpus),
        "rows": rows,
    }


def _losses_row(label: str, losses: Losses) -> list[str]:
    if not losses.tokens:
        return [label, "0", "–", "–"]
    return [label, f"{losses.tokens:,}", _figure(losses.loss, 4), _figure(losses.perplexity, 2)]


def _figure(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"
