"""The models that a run starts with."""

from typing import Any, NamedTuple

import torch

from ..config import TrainConfig
from ..models.architecture import check_memory
from ..models.base import LanguageModel
from ..models.decoder import Decoder, unsupported_reason
from ..models.loading import TransformersLM, load_model
from ..runtime.errors import UserError
from .setup import Setup
from .step import Teacher


class Sources(NamedTuple):
    """Where the models come from; training outputs are resolved to their latest checkpoints."""

    architecture: Any  # transformers' config of a model from scratch
    init_from: str | None
    teacher: str | None


def initial_model(config: TrainConfig, setup: Setup, sources: Sources) -> LanguageModel:
    """The weights before the first step, float32."""
    if sources.init_from:
        model = load_model(sources.init_from, torch.float32, setup.device)
        if len(model.head_weight) < setup.corpus.manifest["vocab_size"]:
            raise UserError(
                f"model {config.init_from} predicts {len(model.head_weight)} ids, the tokenizer of corpus "
                f"{config.data} has {setup.corpus.manifest['vocab_size']}: start from a model that was made "
                f"for it"
            )
    else:
        # Float32 weights and AdamW's two moments are copied to the machine's memory while they are written;
        # trained there, they and the gradients lie beside the copies.
        itemsizes, what = (28 if setup.device.type == "cpu" else 12), config.model_config or "model.*"
        check_memory(sources.architecture, itemsizes, what)
        model = _random_model(config, sources.architecture).to(setup.device)
    set_checkpointing(model, config)
    return model


def _random_model(config: TrainConfig, architecture: Any) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):  # on the CPU, so that every device starts from the same weights
        if not unsupported_reason(architecture):
            torch.manual_seed(config.seed)
            return Decoder(architecture)
        from transformers import AutoModelForCausalLM

        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        return TransformersLM(model, str(config.model_config))


def set_checkpointing(model: LanguageModel, config: TrainConfig) -> None:
    """Turn activation checkpointing on where the config asks for it; UserError for a model that has none."""
    if not config.activation_checkpointing:
        return
    if not isinstance(model, Decoder):
        raise UserError(
            f"activation_checkpointing is built for Qwen2, Llama and Qwen3, not for "
            f"{model.config.model_type}: leave it out, or lower micro_batch_tokens"
        )
    model.activation_checkpointing = True


def load_teacher(config: TrainConfig, setup: Setup, folder: str) -> Teacher:
    """The teacher in `folder`, frozen, in the compute dtype. UserError where it does not know all ids."""
    model, corpus = load_model(folder, setup.dtype, setup.device).requires_grad_(False), setup.corpus
    ids = len(model.head_weight)
    if ids < corpus.manifest["vocab_size"] and ids <= corpus.highest_id:  # the second reads the whole corpus
        raise UserError(
            f"teacher {config.distill.teacher} predicts {ids} ids, corpus {config.data} has ids up to "
            f"{corpus.highest_id}: give a teacher that was made for its tokenizer"
        )
    return Teacher(model, config.distill.alpha, config.distill.temperature)
