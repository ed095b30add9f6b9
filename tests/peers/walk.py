"""Every causal language model of transformers, tiny and random, on our attention and on "sdpa" (make peers).

    python tests/peers/walk.py                    all of AutoModelForCausalLM's mapping, a line for each
    python tests/peers/walk.py llama gpt2         these types of models
    python tests/peers/walk.py --markdown FILE    and the tables of docs/transformers.md

Each model computes whole rows, padded ones, packed documents, with a cache, in training, and with a window
shorter than the text; in float64, so that what differs is not rounding. What stands in a line:

    equal        all of them came out as on "sdpa"; behind it what was refused by name
    refuses      every pass, by name
    refused      when it was told to use our attention, by name
    DIFFERS      another result than on "sdpa"
    RAW          an error that is not ours
    SILENT       our attention was taken and the op never run
    not tried    transformers itself cannot make or run the tiny model

Ends with 1 if a line is in capitals.
"""

import argparse
import contextlib
import io
import platform
import re
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from cases import CASES, cached, padded_left, rows, training
from miniplm.kernels import flash_attention
from tiny_configs import WINDOWS, tiny_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from miniplm.models import transformers_attention
from miniplm.models.transformers_attention import ATTENTION, ATTENTION_OR_SDPA

WINDOW = 4  # tokens
LARGEST = 100_000_000  # parameters
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the largest logit or gradient
OP_CALLS: Counter[str] = Counter()


class Outcome(NamedTuple):
    model_type: str
    word: str
    detail: str


class NotTried(Exception):
    """The model itself cannot be made or run here."""


class OutOfTime(BaseException):
    """Not to be caught by what the model runs in."""


# ---- one model ----


def build(
    config: PreTrainedConfig,
    attention: str | None,
    like: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A model with that attention, with the weights (and the dtype) of another one or random ones."""
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"}  # the others do not multiply float64
    if attention is not None:
        options["attn_implementation"] = attention
    model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), **options)
    if like is not None:
        model = model.to(next(like.parameters()).dtype).eval()
        model.load_state_dict(like.state_dict())
        return model
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def plain_model(config: PreTrainedConfig) -> nn.Module:
    """On "sdpa", or on what the model has instead."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise NotTried(f"{size:,} parameters at the least")
    for dtype in (torch.float64, torch.float32):
        try:
            model = build(config, "sdpa", dtype=dtype)
        except ValueError:
            model = build(config, None, dtype=dtype)
        first = computed(rows, model)
        if not isinstance(first, Exception):
            break
    else:
        raise NotTried(one_line(first))
    if not first.isfinite().all() or first.std() < 1e-6:
        raise NotTried("its logits say nothing")
    return model


def computed(case: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor | Exception:
    torch.manual_seed(0)
    try:
        with torch.set_grad_enabled(case is training), contextlib.redirect_stdout(io.StringIO()):
            return case(model)
    except Exception as error:
        return error


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def is_ours(error: Exception) -> bool:
    return f'attn_implementation="{ATTENTION}' in str(error)


def feature(error: Exception) -> str:
    """What a refusal of ours names; empty for any other error."""
    match = re.search(r"does not support (.*): use |^\w+ (computes .*), which", str(error))
    return re.sub(r"^\w+, which", "a model that", match[match.lastindex]) if match else ""


def differs(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} for {list(expected.shape)}"
    if not torch.equal(found.isnan(), expected.isnan()):
        return "NaN elsewhere"
    found, expected = found.nan_to_num(), expected.nan_to_num()
    error = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    return "" if error <= TOLERANCE[expected.dtype] * largest else f"{error:.1e} of {largest:.1e}"


class Findings:
    """What is to be said of a model, {word: what}; how often the op ran by attention; whether "miniplm"
    takes whole rows."""

    def __init__(self) -> None:
        self.said: dict[str, set[str]] = {}
        self.op_calls: Counter[str] = Counter()
        self.runs_whole_rows = False

    def say(self, word: str, text: str) -> None:
        self.said.setdefault(word, set()).add(text)

    def told(self, word: str) -> str:
        return ", ".join(sorted(self.said[word]))


def compare(config: PreTrainedConfig, cases: list, findings: Findings, title: str = "") -> None:
    """A config's model on our two attentions and on "sdpa"."""
    plain = plain_model(config)
    expected = {case: computed(case, plain) for case in cases}
    for attention in (ATTENTION, ATTENTION_OR_SDPA):
        try:
            model = build(config, attention, plain)
        except Exception as error:
            of_transformers = "does not support an attention implementation through" in str(error)
            word = "refused" if is_ours(error) or of_transformers else "RAW"
            reason = 'has no "sdpa" either' if of_transformers else feature(error) or one_line(error)
            findings.say(word, f"{attention}: {reason}")
            continue
        for case, wanted in expected.items():
            if isinstance(wanted, Exception):
                continue
            name, before = f"{attention}, {title}{case.__name__}", OP_CALLS["op"]
            found = computed(case, model)
            if isinstance(found, Tensor):
                findings.runs_whole_rows |= case is rows and attention == ATTENTION
                findings.op_calls[attention] += OP_CALLS["op"] - before
                if text := differs(found, wanted):
                    findings.say("DIFFERS", f"{name}: {text}")
            elif is_ours(found):
                for part in re.sub(r"a mask of shape \[.*?\]", "", feature(found)).split(", "):
                    if part:  # a mask of one's own is refused, as it must be
                        findings.say(f"refuses, {attention}", part)
            else:
                findings.say("RAW", f"{name}: {one_line(found)}")


def outcome(model_type: str) -> tuple[str, str]:
    """The word of a type's line, and what stands behind it."""
    findings = Findings()
    try:
        config = tiny_config(CONFIG_MAPPING[model_type])
        compare(config, CASES, findings)
        if any(getattr(config.get_text_config(), name, None) for name in WINDOWS):
            config = tiny_config(CONFIG_MAPPING[model_type], **dict.fromkeys(WINDOWS, WINDOW))
            compare(config, [rows, padded_left, cached, training], findings, "window, ")
    except NotTried as reason:
        return "not tried", str(reason)
    except Exception as error:  # of the config, or of the plain model
        return "not tried", one_line(error)
    for word in ("DIFFERS", "RAW"):
        if word in findings.said:
            return word, findings.told(word)
    refusals = "; ".join(f"{word}: {findings.told(word)}" for word in sorted(findings.said))
    if findings.op_calls[ATTENTION]:
        return "equal", refusals
    if findings.runs_whole_rows:
        return "SILENT", refusals
    return ("refused" if "refused" in findings.said else "refuses"), refusals.replace("refused: ", "")


def walk(model_types: list[str], seconds: int) -> list[Outcome]:
    """The outcomes, each printed as it comes."""

    def out_of_time(*_: Any) -> None:
        raise OutOfTime

    def counted(*arguments: Any) -> Tensor:
        OP_CALLS["op"] += 1
        return flash_attention(*arguments)

    signal.signal(signal.SIGPROF, out_of_time)
    outcomes = []
    for model_type in model_types:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            with mock.patch.object(transformers_attention, "flash_attention", counted):
                word, detail = outcome(model_type)
        except OutOfTime:
            word, detail = "not tried", f"not done in {seconds} s of processor time"
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcomes.append(Outcome(model_type, word, detail))
        print(f"{word:<10} {model_type:<24} {time.monotonic() - start:4.1f} s  {detail}", flush=True)
    return outcomes


def markdown(outcomes: list[Outcome]) -> str:
    """A table of each word: what stands behind it, and of which types of models."""
    lines = []
    for word, count in Counter(each.word for each in outcomes).most_common():
        lines += [f"### {word}: {count}", "", "| | types of models |", "|---|---|"]
        types = defaultdict(list)
        for each in outcomes:
            if each.word == word:
                types[each.detail.replace("|", "\\|")].append(each.model_type)
        lines += [f"| {detail} | {', '.join(types[detail])} |" for detail in sorted(types)] + [""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_types", nargs="*", default=[], help="all if none is named")
    parser.add_argument("--markdown", type=Path, help="a file for the tables")
    parser.add_argument("--seconds", type=int, default=60, help="of processor time for one model")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes = walk(options.model_types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), options.seconds)
    counts = Counter(each.word for each in outcomes)
    print(
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}: "
        + ", ".join(f"{count} {word}" for word, count in counts.most_common())
    )
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(outcomes), encoding="utf-8")
    return int(any(word.isupper() for word in counts))


if __name__ == "__main__":
    sys.exit(main())
