"""MiniPLM's kernels in transformers' Trainer: `patch(model)` before training, `unpatch(model)` before saving.

    pip install -e '.[gguf]'          # in this repository: the package, and accelerate for the Trainer
    python examples/patch_trainer.py

A tiny Qwen2 model is trained twice on packed documents (DataCollatorWithFlattening: one row, position_ids
that restart, no padding), as it is and patched. The losses are equal up to rounding; the patched model's loss
comes without whole logits. No network; seconds on a CPU.
"""

import tempfile
from pydoc_data.topics import topics

import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PrinterCallback,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from miniplm.huggingface import patch, unpatch

STEPS, ROWS, LONGEST = 10, 4, 200


def tiny_model() -> torch.nn.Module:
    """Random; its ids are bytes. Yours: AutoModelForCausalLM.from_pretrained(...), Qwen2, Llama or Qwen3."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


def documents() -> list[dict[str, list[int]]]:
    """Texts of unequal length, from the language reference that every Python carries."""
    texts = [topics[name] for name in sorted(topics)]
    return [{"input_ids": list(text.encode())[: LONGEST - 7 * (i % 9)]} for i, text in enumerate(texts)]


def train(model: torch.nn.Module, folder: str) -> list[float]:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=documents(), data_collator=DataCollatorWithFlattening())
    trainer.remove_callback(PrinterCallback)  # the losses are printed below, side by side
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = train(tiny_model(), folder)
        model = patch(tiny_model())
        patched = train(model, folder)
        print("step  transformers   patched")
        for step, pair in enumerate(zip(plain, patched, strict=True), start=1):
            print(f"{step:>4}  {pair[0]:>12.4f}  {pair[1]:>8.4f}")
        print(f"largest difference {max(abs(a - b) for a, b in zip(plain, patched, strict=True)):.1e}")

        unpatch(model).save_pretrained(folder)  # transformers' own model again, with what was learned
        saved = AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.tensor([documents()[0]["input_ids"]])
        with torch.no_grad():
            equal = torch.equal(model.cpu().eval()(ids).logits, saved(ids).logits)
        print(f"saved and loaded without MiniPLM: {'equal' if equal else 'DIFFERENT'} logits")


if __name__ == "__main__":
    main()
