"""A model's config.json, judged before anything is made by it: what it says may be damaged, or meant to do
harm."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, create_model

from ..runtime.devices import machine_bytes
from ..runtime.errors import UserError, reason
from ..runtime.files import read_json
from ..runtime.schema import Record, read_record
from .adapter import estimated_flops, quiet_transformers
from .decoder import ARCHITECTURES, Decoder, unsupported_reason
from .flops import ForwardFlops, forward_cost

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

REMEDY = "correct or restore it, or download the model again"


def _whole(low: int, high: int) -> Any:
    return Annotated[int, Field(ge=low, le=high)] | None


def _number(low: float, high: float) -> Any:
    return Annotated[float, Field(ge=low, le=high)] | None


def _schema(name: str, *kinds: tuple[str, Any]) -> type[Record]:
    fields: Any = {field: (kind, None) for names, kind in kinds for field in names.split()}
    return create_model(name, __base__=Record, **fields)


# The settings by the names that they have in transformers. The bounds are well above any model there is: what
# is larger is damaged, and it would take long to find out that it fits into no memory.
Settings = _schema(
    "Settings",
    ("hidden_size n_embd d_model word_embed_proj_dim embedding_size", _whole(1, 2**20)),
    ("intermediate_size n_inner ffn_dim moe_intermediate_size", _whole(1, 2**20)),
    ("head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank", _whole(1, 2**14)),
    ("num_hidden_layers n_layer num_layers n_layers", _whole(1, 4_096)),
    ("num_attention_heads n_head num_heads n_heads num_key_value_heads", _whole(1, 2**16)),
    ("num_experts num_local_experts n_routed_experts num_experts_per_tok", _whole(0, 4_096)),
    ("vocab_size", _whole(1, 2**24)),
    ("max_position_embeddings n_positions n_ctx max_seq_len", _whole(1, 2**28)),
    ("bos_token_id eos_token_id pad_token_id", _whole(-1, 2**24)),  # −1: none, for some
    ("rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon", _number(0, 1)),
    ("initializer_range", _number(0, 1e6)),
    ("rope_theta rotary_emb_base rope_local_base_freq", _number(1e-6, 1e18)),
    ("tie_word_embeddings attention_bias mlp_bias use_cache use_bias", bool | None),
    ("model_type hidden_act hidden_activation activation_function", str | None),
    ("rope_parameters rope_scaling", dict[str, Any] | None),
)
Rope = _schema(
    "Rope",
    ("rope_type type", str | None),
    ("rope_theta factor attention_factor", _number(1e-6, 1e18)),
    ("beta_fast beta_slow mscale mscale_all_dim long_mscale short_mscale", _number(0, 1e18)),
    ("low_freq_factor high_freq_factor", _number(1e-6, 1e18)),
    ("partial_rotary_factor", _number(1e-6, 1)),
    ("original_max_position_embeddings", _whole(1, 2**28)),
    ("short_factor long_factor", list[Annotated[float, Field(gt=0, le=1e18)]] | None),
)
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def read_config(path: Path, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """transformers' config in a config.json, or in the folder that holds one.

    Raises:
        UserError: there is none, or a model cannot be made by it; the line says which setting is wrong.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    source, path = path, path / "config.json" if path.is_dir() else path
    if source != path and not path.exists():
        raise UserError(f"{source} holds no config.json: give a model's folder")
    content = read_json(path)
    check_settings(content, path)
    kind = content.get("model_type")
    if "auto_map" not in content and kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path} describes no model (model_type {kind!r} is not known to transformers): {REMEDY}"
        )
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises anything, from KeyError to OSError
        raise UserError(f"transformers cannot read {path}: {reason(error)}") from error
    if "auto_map" not in content and (fault := _fault(config.get_text_config())):
        raise UserError(f"{path} describes no model ({fault}): {REMEDY}")
    return config


def check_settings(content: object, path: Path) -> None:
    """UserError unless the settings that are known by name have values that they can have."""
    what = f"{path} describes no model"
    read_record(Record, content, what, REMEDY)
    assert isinstance(content, dict)
    for settings in _one_for_all_layers(content):
        read_record(Settings, settings, what, REMEDY)
    for name, value in content.items():
        if isinstance(value, dict) and name in ("rope_parameters", "rope_scaling"):
            # Of some models by the type of layer.
            ropes = [inner for inner in value.values() if isinstance(inner, dict)]
            for rope in [value, *ropes]:
                read_record(Rope, rope, f"{what} ({name})", REMEDY)
        elif isinstance(value, dict) and name.endswith("_config"):
            check_settings(value, path)


def _one_for_all_layers(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings, those that are lists (one for each layer; several ids) item by item."""
    lists = {
        name: value
        for name, value in content.items()
        if name in Settings.model_fields and isinstance(value, list) and value
    }
    yield {name: value for name, value in content.items() if name not in lists}
    for name, values in lists.items():
        for value in values:
            yield {name: value}


def _fault(config: "PreTrainedConfig") -> str | None:
    """What keeps a model from being made by settings that are right one by one."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name in ACTIVATIONS:
        if (value := getattr(config, name, None)) is not None and value not in ACT2FN:
            return f"{name} {value!r} is not known"
    rope = getattr(config, "rope_parameters", None) or {}
    for inner in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if inner.get("rope_type", "default") not in ("default", *ROPE_INIT_FUNCTIONS):
            return f"rope_type {inner['rope_type']!r} is not known"
    if config.model_type not in ARCHITECTURES:
        return None  # transformers says what it takes
    if not isinstance(rope.get("rope_theta"), float | int) or "rope_type" not in rope:
        return "rope_parameters needs rope_theta and rope_type"
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in (*sizes, "rms_norm_eps", "initializer_range"):
        if not isinstance(getattr(config, name, None), int | float):
            return f"{name} is missing"
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if key_heads and heads % key_heads:
        return f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}"
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and config.hidden_size % heads:
        return f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}"
    if (head_dim or config.hidden_size // heads) % 2:
        return f"the width of a head, {head_dim or config.hidden_size // heads}, is odd"
    return None


def without_memory(config: "PreTrainedConfig", what: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """The model of a config on the meta device: its shapes, in no memory.

    Args:
        what: whose config it is, in messages.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        try:
            if not unsupported_reason(config):
                return Decoder(config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever the code of a model raises
            raise UserError(f"no model can be made by the config of {what}: {reason(error)}") from error


def forward_cost_of(config: "PreTrainedConfig", what: str, trust_remote_code: bool = False) -> ForwardFlops:
    """What a forward pass of a model by this config costs; nothing is allocated. UserError where no model can
    be made by it.

    Args:
        what: whose config it is, in messages.
    """
    model: Any = without_memory(config, what, trust_remote_code)
    if isinstance(model, Decoder):
        return forward_cost(model)
    per_token = estimated_flops(model, 0)
    head = 2 * model.get_output_embeddings().weight.numel()
    return ForwardFlops(per_token, estimated_flops(model, 1) - per_token, head)


def check_memory(
    config: "PreTrainedConfig", bytes_per_parameter: int, what: str, trust_remote_code: bool = False
) -> None:
    """UserError if a model by this config, in the machine's memory with all that comes with a parameter, does
    not fit into all of it. Nothing is allocated.

    Args:
        what: whose config it is, in messages.
    """
    available = machine_bytes()
    model = without_memory(config, what, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if available and bytes_per_parameter * parameters > available:
        raise UserError(
            f"{what} describes a model of {parameters:,} parameters, which takes "
            f"{bytes_per_parameter * parameters / 1e9:,.1f} GB of memory; this machine has "
            f"{available / 1e9:,.1f} GB: make it smaller, or take a larger machine"
        )
