"""transformers' common tests of models for tiny ones of our own, as transformers_suite.py lays them out.

The source distribution of transformers has test_modeling_common.py, but not the tests of each model that give
it something to test: here they are, a class for each type of model.
"""

import importlib
import unittest
from typing import Any

import torch
from tiny_configs import LAYERS, VOCABULARY, WIDTH, tiny_config
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

# A module of transformers' tests, beside which this file is laid.
ModelTesterMixin = importlib.import_module(".test_modeling_common", __package__).ModelTesterMixin


class Tester:
    """What ModelTesterMixin asks for its configs and inputs."""

    batch_size, seq_length, num_hidden_layers, hidden_size = 2, 7, LAYERS, WIDTH
    is_training = True

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def get_config(self) -> PreTrainedConfig:
        return tiny_config(CONFIG_MAPPING[self.model_type], initializer_range=0.02)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        shape = self.batch_size, self.seq_length
        mask = torch.ones(shape, dtype=torch.int64)
        return self.get_config(), {
            "input_ids": torch.randint(3, VOCABULARY, shape),
            "attention_mask": mask.tril(),
        }


def tests_of(model_type: str) -> type[unittest.TestCase]:
    def set_up(self: unittest.TestCase) -> None:
        self.model_tester = Tester(model_type)

    config_class = CONFIG_MAPPING[model_type]
    members = {
        "setUp": set_up,
        "all_model_classes": (MODEL_MAPPING[config_class], MODEL_FOR_CAUSAL_LM_MAPPING[config_class]),
    }
    return type(f"Test_{model_type}", (ModelTesterMixin, unittest.TestCase), members)


TYPES = ("qwen2", "llama", "qwen3", "gpt2", "gemma", "mistral", "phi", "olmo")
globals().update({f"Test_{model_type}": tests_of(model_type) for model_type in TYPES})
