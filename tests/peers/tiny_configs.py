"""Tiny configs of transformers' architectures, made from their defaults by the names of their settings."""

from typing import Any

from transformers import PreTrainedConfig

VOCABULARY, WIDTH, HEADS, HEAD_DIM, LAYERS = 97, 32, 4, 8, 4
SMALL = {
    name: value
    for value, names in [
        (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
        (
            WIDTH,
            "hidden_size n_embd d_model emb_dim word_embed_proj_dim embedding_size attention_hidden_size "
            "hidden_size_global lru_width input_embedding_size output_embedding_size out_hidden_size dim "
            "embedding_dim q_lora_rank o_lora_rank",
        ),
        (
            48,
            "intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim d_ff dff "
            "d_inner decoder_ffn_dim encoder_ffn_dim shared_intermediate_size n_inner feed_forward_size "
            "ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size mlp_dim "
            "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
        ),
        (
            LAYERS,
            "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_decoder_layers",
        ),
        (
            HEADS,
            "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
            "attention_heads num_decoder_attention_heads num_encoder_attention_heads "
            "swa_num_attention_heads linear_num_value_heads linear_num_heads",
        ),
        (
            2,
            "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads n_groups n_group "
            "num_experts_per_tok moe_topk topk_group num_experts_per_token n_shared_experts index_n_heads "
            "mamba_n_groups moe_top_k num_shared_experts temporal_patch_size mamba_expand expand o_groups "
            "moe_num_shared_experts mamba_ngroups",
        ),
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim rotary_dim"),
        (
            HEAD_DIM,
            "head_dim qk_nope_head_dim v_head_dim d_kv d_head kv_channels global_head_dim swa_head_dim "
            "linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_size patch_size "
            "attention_head_dim kv_lora_rank hidden_size_per_layer_input laurel_rank state_size "
            "mamba_d_state time_step_rank ssm_state_size mamba_dt_rank mamba_d_head index_head_dim "
            "gated_norm_rank mamba_head_dim n_mamba_heads mamba_num_heads mamba_n_heads chunk_size "
            "mamba_chunk_size",
        ),
        (
            128,
            "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
            "max_target_positions sliding_window sliding_window_size attention_chunk_size window_size "
            "attention_window_size index_topk",
        ),
        (
            0,
            "attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout dropout activation_dropout "
            "hidden_dropout_prob attention_probs_dropout_prob embedding_dropout layerdrop decoder_layerdrop "
            "encoder_layerdrop dropout_rate resid_dropout embed_dropout attn_dropout input_jitter_noise "
            "router_jitter_noise local_attention_probs_dropout_prob lsh_attention_probs_dropout_prob "
            "emb_pdrop residual_dropout dropout_p pad_token_id",
        ),
        (
            1,
            "bos_token_id first_k_dense_replace num_dense_layers moe_layer_start_index "
            "num_nextn_predict_layers",
        ),
        (2, "eos_token_id"),
        (0.2, "initializer_range init_std"),
    ]
    for name in names.split()
}
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size")
# What is given a value where the default is None, too.
OF_NONE = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_shared_experts", "n_routed_experts")
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
DOUBLE_WIDTH = {"attention_head_dim": 16, "attention_hidden_size": 64}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 128,
    "indexer_compress_ratio": 4,
}
# By the type of model, what else its sizes must fit, or what its default layers leave out.
PARTICULAR: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass": {"layer_types": MIXED},
    "cohere_compass_text": {
        "layer_types": MIXED,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in set(MIXED)
        },
    },
    "bailing_hybrid": {"layer_group_size": 2, "qk_rope_head_dim": 8, "head_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": MIXED, "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": MIXED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_hidden_layers": 5, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xlstm": {"num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, **DOUBLE_WIDTH},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, **DOUBLE_WIDTH},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of the class with small sizes, and with these changes where it has the settings."""
    default = config_class()
    values, settings = default.to_dict(), {}
    small = {**SMALL, **changes}
    if "kv_lora_rank" in values:  # heads of latent attention
        small |= {"num_key_value_heads": HEADS, "head_dim": small["qk_rope_head_dim"]}
    for name, value in small.items():
        there = values.get(name)
        if isinstance(there, int | float) and not isinstance(there, bool):
            settings[name] = type(there)(value)
        elif name in values and there is None and name in OF_NONE:
            settings[name] = value
    if values.get("is_decoder") is False:  # models that are encoders unless told otherwise
        settings["is_decoder"] = True
    for name in config_class.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            settings[name] = tiny_config(type(sub), **changes).to_dict()
    return config_class(**{**settings, **PARTICULAR.get(config_class.model_type, {})})
