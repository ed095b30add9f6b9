"""Ten steps of a tiny Qwen2 model in what people train with: on "sdpa", on our attention, and patched.

    python tests/peers/trainers.py                all of them (make peers)
    python tests/peers/trainers.py DDP FSDP2      these

DDP and FSDP2 run in two processes on the CPU; PEFT trains adapters of LoRA; TRL trains on padded texts and on
packed ones. A line for each: the losses must agree with those on "sdpa" to 1e-4. Ends with 1 if one does not.
"""

import argparse
import contextlib
import io
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tiny_configs import VOCABULARY
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Trainer, TrainingArguments

from miniplm.huggingface import patch

STEPS, ROWS, TOKENS, PROCESSES = 10, 4, 16, 2
WAYS = ("sdpa", "miniplm", "patched")  # the first is compared with


def tiny_model(way: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="miniplm" if way == "miniplm" else "sdpa"
    )
    return patch(model) if way == "patched" else model


def texts() -> list[dict[str, list[int]]]:
    """Of 4 to 15 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [4 + 7 * i % 12 for i in range(STEPS * ROWS)]
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()}
        for length in lengths
    ]


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ---- several processes ----


def train_wrapped(wrap: Callable[[nn.Module], nn.Module], way: str) -> list[float]:
    model = wrap(tiny_model(way)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step, dist.get_rank())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(model: PreTrainedModel) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def process(rank: int, port: int, wrap: Callable[[nn.Module], nn.Module], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    losses = {way: train_wrapped(wrap, way) for way in WAYS}
    dist.destroy_process_group()
    torch.save(losses, Path(folder) / str(rank))


def in_processes(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (port, wrap, folder), nprocs=PROCESSES)
        found = [torch.load(Path(folder) / str(rank)) for rank in range(PROCESSES)]
    return {way: [loss for losses in found for loss in losses[way]] for way in WAYS}


# ---- Trainer, PEFT, TRL ----


def settings(folder: str) -> dict[str, object]:
    return dict(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
    )


def losses_of(trainer: Trainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def with_trainer(way: str, folder: str) -> list[float]:
    rows = [{name: x[i] for name, x in batch(step, 0).items()} for step in range(STEPS) for i in range(ROWS)]
    return losses_of(Trainer(tiny_model(way), TrainingArguments(**settings(folder)), train_dataset=rows))


def with_peft(way: str, folder: str) -> list[float]:
    import peft

    model = tiny_model(way)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"]))
    rows = [{name: x[i] for name, x in batch(step, 0).items()} for step in range(STEPS) for i in range(ROWS)]
    return losses_of(Trainer(adapted, TrainingArguments(**settings(folder)), train_dataset=rows))


def with_trl(way: str, folder: str, **options: object) -> list[float]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")
    trainer = SFTTrainer(
        tiny_model(way),
        SFTConfig(**settings(folder), max_length=TOKENS, **options),
        train_dataset=Dataset.from_list(texts()),
        processing_class=tokenizer,
    )
    return losses_of(trainer)


def in_this_process(train: Callable[..., list[float]], **options: object) -> dict[str, list[float]]:
    losses = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            losses[way] = train(way, folder, **options)
    return losses


TRIALS = {
    "DDP": lambda: in_processes(DistributedDataParallel),
    "FSDP2": lambda: in_processes(sharded),
    "Trainer": lambda: in_this_process(with_trainer),
    "PEFT": lambda: in_this_process(with_peft),
    "TRL-padded": lambda: in_this_process(with_trl),
    "TRL-packed": lambda: in_this_process(with_trl, packing=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trials", nargs="*", help=f"of {', '.join(TRIALS)}; all if none is named")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    wrong = 0
    for name in parser.parse_args().trials or TRIALS:
        with contextlib.redirect_stdout(io.StringIO()):
            losses = TRIALS[name]()
        first, *others = (torch.tensor(losses[way]) for way in WAYS)
        error = max((other - first).abs().max().item() for other in others)
        word = "equal" if error <= 1e-4 else "DIFFERS"
        wrong += word == "DIFFERS"
        ends = f"{first[0]:.3f} to {first[-1]:.3f}"
        print(f"{word:<8} {name:<12} {len(first)} losses, {ends}, within {error:.1e}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
