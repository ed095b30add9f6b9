"""Shared fixtures: a tiny tokenizer, tiny random models and a tiny corpus, all made here, offline and
seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic

import atexit
import random
import shutil
import sys
import tempfile

import pytest
import torch
from texts import make_text

os.environ["MINIPLM_CACHE"] = tempfile.mkdtemp(prefix="miniplm-tests-")  # not the user's
atexit.register(shutil.rmtree, os.environ["MINIPLM_CACHE"], ignore_errors=True)

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when a kernel is defined, so before the package is imported


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def pytest_runtest_logreport(report):
    """With FAILURES_AT_ONCE a failure is printed as it comes: a run that is cut would not come to the end,
    where pytest prints them."""
    if report.failed and os.environ.get("FAILURES_AT_ONCE") and not os.environ.get("PYTEST_XDIST_WORKER"):
        print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> str:
    """Folder of a byte-level BPE tokenizer with 500 ids, EOS "<|endoftext|>"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator(
        (make_text(rng, 60) + " " + "".join(rng.choices("abcdefghij", k=400)) for _ in range(200)), trainer
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    """tiny_model(folder, seed=0, config_class=Qwen2Config, **config) writes a random model with the tiny
    tokenizer, as transformers would."""

    def make(folder, seed=0, config_class=None, **overrides) -> str:
        from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

        settings = dict(
            vocab_size=500,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.3,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config((config_class or Qwen2Config)(**{**settings, **overrides}))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tiny_tokenizer, tmp_path_factory) -> str:
    """Folder of a complete corpus: 2 domains, chunks of at most 65 ids, some with EOS inside, one of a single
    id."""
    from corpora import write_corpus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    rng = random.Random(1)
    chunks, domains = [], []
    for row in range(40):
        ids = []
        while len(ids) < rng.choice([10, 40, 65]):
            ids += tokenizer(make_text(rng, rng.choice([0, 2, 20])))["input_ids"] + [tokenizer.eos_token_id]
        chunks.append([tokenizer.eos_token_id] if row == 17 else ids[:65])
        domains.append("books" if row % 3 else "code")
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return write_corpus(folder, chunks, tiny_tokenizer, domains, source="tiny.jsonl")
