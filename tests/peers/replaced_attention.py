"""A plugin for pytest: transformers' "sdpa" is our attention, with "sdpa" where ours refuses.

MINIPLM_COUNTS=FILE python -m pytest -p replaced_attention …       how often the op ran goes into FILE
"""

import os
from pathlib import Path
from typing import Any

from miniplm.kernels import flash_attention
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from miniplm.models import transformers_attention
from miniplm.models.transformers_masks import documents_or_sdpa_mask

calls = 0


def counted(*arguments: Any) -> Tensor:
    global calls
    calls += 1
    return flash_attention(*arguments)


def pytest_configure() -> None:
    transformers_attention.flash_attention = counted
    ALL_ATTENTION_FUNCTIONS["sdpa"] = transformers_attention.attention_or_sdpa
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = documents_or_sdpa_mask


def pytest_unconfigure() -> None:
    Path(os.environ["MINIPLM_COUNTS"]).write_text(str(calls), encoding="utf-8")
