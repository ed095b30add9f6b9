"""MiniPLM's kernels in TRL's SFTTrainer, with packing: `patch(model)` before training, `unpatch` after it.

    pip install -e . trl          # in this repository
    python examples/patch_trl.py

A tiny Qwen2 model is trained twice on packed texts, as it is and patched. RMSNorm, SwiGLU, rotary embedding
and attention run on MiniPLM's kernels, attention within each of the packed texts. The loss is TRL's own: its
trainers compute it from the hidden states, without whole logits too. The losses are equal up to rounding. No
network; seconds on a CPU.
"""

import tempfile
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
)
from trl import SFTConfig, SFTTrainer

from miniplm.huggingface import patch, unpatch

STEPS, ROWS, ROW_TOKENS = 10, 2, 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and two more. Yours: AutoTokenizer.from_pretrained(...)."""
    names = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """A random model. Yours: AutoModelForCausalLM.from_pretrained(...), Qwen2, Llama or Qwen3."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: str) -> list[float]:
    texts = [{"text": topics[name][: 60 + 29 * (i % 6)]} for i, name in enumerate(sorted(topics))]
    arguments = SFTConfig(
        output_dir=folder,
        max_length=ROW_TOKENS,
        packing=True,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,  # so that rounding is small
        gradient_checkpointing=None,  # TRL turns it on by its old name, of which transformers warns
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)  # the losses are printed below, side by side
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    tokenizer = byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        plain = train(tiny_model(tokenizer), tokenizer, folder)
        model = patch(tiny_model(tokenizer))
        patched = train(model, tokenizer, folder)
        print("step  transformers   patched")
        for step, pair in enumerate(zip(plain, patched, strict=True), start=1):
            print(f"{step:>4}  {pair[0]:>12.4f}  {pair[1]:>8.4f}")
        print(f"largest difference {max(abs(a - b) for a, b in zip(plain, patched, strict=True)):.1e}")

        unpatch(model).save_pretrained(folder)  # transformers' own model again, with what was learned
        saved = AutoModelForCausalLM.from_pretrained(folder)
        batch = tokenizer("An example", return_tensors="pt")
        with torch.no_grad():
            equal = torch.equal(model.cpu().eval()(**batch).logits, saved(**batch).logits)
        print(f"saved and loaded without MiniPLM: {'equal' if equal else 'DIFFERENT'} logits")


if __name__ == "__main__":
    main()
