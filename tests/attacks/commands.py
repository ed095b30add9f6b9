"""The small pipeline whose files attack.py damages, and the commands that read them."""

import json
import random
from collections.abc import Callable
from pathlib import Path

from texts import make_text

MODEL = (
    "--model.hidden-size 32 --model.intermediate-size 48 --model.num-hidden-layers 1 "
    "--model.num-attention-heads 2 --batch-tokens 500 --peak-tflops 0.1 --log-interval 2 "
    "--checkpoint.interval 3 "
)
PREPARE = (
    "prepare --data {t}/text.jsonl --tokenizer {t}/tokenizer --domain-column domain --max-length 64 "
    "--workers 1 --shard-tokens 2000 --output {t}/"
)
SCORE = "score --data {t}/corpus --teacher {t}/teacher --reference {t}/reference --shard-chunks 40 --output "
TOKENS = SCORE.replace("corpus", "refined").replace("--output", "--tokens --output")
STUDENT = (
    "train --data {t}/refined --steps 8 --distill.teacher {t}/teacher --eval.data {t}/corpus "
    + MODEL
    + "--output "
)
TOKEN_STUDENT = STUDENT.replace("--output", "--token-scores {t}/tokens --output")
SYNTHESIZE = (
    "synthesize --data {t}/corpus --teacher {t}/teacher --prompt-tokens 40 --shard-chunks 40 --output "
)
RETOKENIZE = (
    "retokenize --data {t}/refined --tokenizer {t}/other --max-length 40 --workers 1 --shard-tokens 2000 "
    "--output {t}/"
)
FIT = "proxy fit --data {t}/corpus --scores {t}/sample --held-out 0.3 --ngram.buckets 2000 --output {t}/"
PREDICT = "proxy score --data {t}/corpus --proxy {t}/proxy --shard-chunks 60 --output {t}/"
EXPORT_DATA = "export data --data {t}/refined --name data --output {t}/"
EVALUATE = "evaluate --data {t}/refined --model "
BUILD = [
    PREPARE + "corpus",
    f"train --data {{t}}/corpus --steps 6 --output {{t}}/teacher {MODEL}",
    f"train --data {{t}}/corpus --steps 4 --seed 3 --output {{t}}/reference {MODEL}",
    SCORE + "{t}/scores",
    "score --data {t}/corpus --teacher {t}/teacher --shard-chunks 40 --output {t}/scores-teacher",
    "score --data {t}/corpus --reference {t}/reference --shard-chunks 40 --output {t}/scores-reference",
    "select --data {t}/corpus --scores {t}/scores --output {t}/refined",
    STUDENT + "{t}/student",
    EVALUATE + "{t}/student --output {t}/loss.json",
    "export --checkpoint {t}/student --evaluation {t}/loss.json --output {t}/model",
    SYNTHESIZE + "{t}/text",
    RETOKENIZE + "retokenized",
    TOKENS + "{t}/tokens",
    SCORE + "{t}/sample --sample 0.4",
    FIT + "proxy",
    PREDICT + "predicted",
    EXPORT_DATA + "data",
]
# Stopped: the command, the module and its function that ends the process at the call with this number.
STOPPED = [
    (PREPARE + "corpus-half", "stages.prepare", "write_chunks", 3),
    (RETOKENIZE + "retokenized-half", "stages.retokenize", "write_chunks", 3),
    (SCORE + "{t}/scores-half", "analysis.score_shards", "write_shard", 3),
    (TOKENS + "{t}/tokens-half", "analysis.score_shards", "write_tokens", 3),
    (TOKEN_STUDENT + "{t}/token-student-half", "training.loop", "train_step", 7),
    (STUDENT + "{t}/student-half", "training.loop", "train_step", 7),
    (SYNTHESIZE + "{t}/text-half", "stages.synthesize", "write_chunks", 3),
    (SCORE + "{t}/sample-half --sample 0.4", "analysis.score_shards", "write_shard", 2),
    (PREDICT + "predicted-half", "stages.proxy_score", "write_shard", 3),
]
# name: (command, what it writes, the folders and files that are attacked for it). {t}: the tree; what a
# command writes is there already where it is among what is attacked.
COMMANDS = {
    "prepare again": (PREPARE + "corpus", "corpus", "corpus"),
    "prepare resumed": (PREPARE + "corpus-half", "corpus-half", "corpus-half"),
    "score": (SCORE + "{t}/new", "new", "corpus teacher reference"),
    "score exported": (SCORE.replace("{t}/teacher", "{t}/model") + "{t}/new", "new", "model"),
    "score again": (SCORE + "{t}/scores", "scores", "scores"),
    "score resumed": (SCORE + "{t}/scores-half", "scores-half", "scores-half"),
    "score tokens": (TOKENS + "{t}/new", "new", "refined teacher reference"),
    "score tokens again": (TOKENS + "{t}/tokens", "tokens", "tokens"),
    "score tokens resumed": (TOKENS + "{t}/tokens-half", "tokens-half", "tokens-half"),
    "select": ("select --data {t}/corpus --scores {t}/scores --output {t}/new", "new", "corpus scores"),
    "select of two": (
        "select --data {t}/corpus --scores {t}/scores-teacher {t}/scores-reference --output {t}/new",
        "new",
        "scores-teacher scores-reference",
    ),
    "select again": (BUILD[6], "refined", "refined"),
    "synthesize": (SYNTHESIZE + "{t}/new", "new", "corpus teacher"),
    "synthesize again": (SYNTHESIZE + "{t}/text", "text", "text"),
    "synthesize resumed": (SYNTHESIZE + "{t}/text-half", "text-half", "text-half"),
    "retokenize": (RETOKENIZE + "new", "new", "refined"),
    "retokenize again": (RETOKENIZE + "retokenized", "retokenized", "retokenized"),
    "retokenize resumed": (RETOKENIZE + "retokenized-half", "retokenized-half", "retokenized-half"),
    "sample again": (SCORE + "{t}/sample --sample 0.4", "sample", "sample"),
    "sample resumed": (SCORE + "{t}/sample-half --sample 0.4", "sample-half", "sample-half"),
    "proxy fit": (FIT + "new", "new", "corpus sample"),
    "proxy fit again": (FIT + "proxy", "proxy", "proxy"),
    "proxy score": (PREDICT + "new", "new", "corpus proxy"),
    "proxy score again": (PREDICT + "predicted", "predicted", "predicted"),
    "proxy score resumed": (PREDICT + "predicted-half", "predicted-half", "predicted-half"),
    "select predicted": (
        "select --data {t}/corpus --scores {t}/predicted --output {t}/new", "new", "predicted"
    ),
    "train": (STUDENT + "{t}/new", "new", "refined teacher corpus"),
    "train from": (
        "train --data {t}/refined --steps 3 --init-from {t}/model --batch-tokens 500 --output {t}/new",
        "new",
        "model",
    ),
    "train on tokens": (TOKEN_STUDENT + "{t}/new", "new", "refined tokens"),
    "train on tokens resumed": (
        TOKEN_STUDENT + "{t}/token-student-half",
        "token-student-half",
        "token-student-half tokens",
    ),
    "train again": (STUDENT + "{t}/student", "student", "student"),
    "train resumed": (STUDENT + "{t}/student-half", "student-half", "student-half"),
    "evaluate": (EVALUATE + "{t}/student --output {t}/new", "new", "student refined"),
    "evaluate exported": (EVALUATE + "{t}/model --output {t}/new", "new", "model"),
    "evaluate again": (BUILD[8], "loss.json", "loss.json"),
    "generate": ("generate --model {t}/student --prompt a --max-new-tokens 8", None, "student"),
    "generate exported": ("generate --model {t}/model --prompt a --max-new-tokens 8", None, "model"),
    "export": (BUILD[9].replace("/model", "/new"), "new", "student loss.json"),
    "export data": (EXPORT_DATA + "new", "new", "refined"),
    "export data again": (EXPORT_DATA + "data", "data", "data"),
    "export halfway": ("export --checkpoint {t}/student-half --output {t}/new", "new", "student-half"),
    "export again": (BUILD[9], "model", "model"),
}  # fmt: skip


def build(tree: Path, run: Callable[..., int]) -> None:
    """Run the pipeline in a new folder. `run(command, tree, stop=None)` gives the exit code of a command."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    texts = [make_text(rng, rng.randint(5, 60)) for _ in range(300)]
    tree.mkdir(parents=True)
    lines = [json.dumps({"text": text, "domain": rng.choice("ab")}) + "\n" for text in texts]
    (tree / "text.jsonl").write_text("".join(lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(tree / "tokenizer")
    fast.add_tokens(["student", "teacher"])
    fast.save_pretrained(tree / "other")
    for command in BUILD:
        assert run(command, tree) == 0, command
    for command, *stop in STOPPED:
        assert run(command, tree, tuple(stop)) == 0, command
