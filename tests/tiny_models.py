"""A tiny random model of any model type that transformers knows, made from its config.

`tiny_config` sets every size of a config small, by the names that configs give their sizes; TYPES has what a model type
needs beyond that. Layers that differ in kind (attention with a window, recurrent, dense, mixture of experts) are all
kept once.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 299
PAD, BOS, EOS = 0, 1, 2
CONTEXT = 256
WINDOW = 12  # of sliding windows and chunks: shorter than the prompts, so that they matter

# the names that configs give their sizes; only those that a config has are set
NAMES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    32: "hidden_size d_model n_embd embedding_size input_embedding_size emb_dim embedding_dim "
    "attention_hidden_size word_embed_proj_dim lru_width dim_model_base linear_attn_hidden_size "
    "moe_intermediate_size expert_ffn_hidden_size",
    48: "output_embedding_size",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size d_inner dim_ff dff "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size shared_expert_intermediate_size "
    "shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size "
    "mamba_d_ssm",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_heads "
    "linear_num_value_heads swa_num_attention_heads mamba_num_heads qk_rope_head_dim rotary_dim "
    "mamba_dt_rank time_step_rank num_experts num_local_experts n_routed_experts moe_num_experts "
    "zero_expert_num",
    2: "num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads num_query_groups "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group",
    8: "head_dim d_head dim_head d_kv kv_channels v_head_dim linear_key_head_dim global_head_dim "
    "linear_value_head_dim linear_head_dim swa_head_dim attention_head_size qk_nope_head_dim "
    "ssm_state_size state_size mamba_d_state kv_lora_rank q_lora_rank o_lora_rank adapter_rank "
    "laurel_rank hidden_size_per_layer_input index_head_dim gated_norm_rank d_rel hc_lowrank "
    "router_hidden_size query_pre_attn_scalar",
    WINDOW: "sliding_window window_size sliding_window_size attention_window_size local_attention "
    "attention_chunk_size keep_window_size",
    CONTEXT: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "max_source_positions model_max_length original_max_position_embeddings",
    1: "topk_group",
    6: "index_topk",  # fewer than a prompt has, as for windows
    16: "chunk_size mamba_chunk_size block_size",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()} | {"qk_head_dim": 12}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "encoder_layers",
          "num_decoder_layers", "num_encoder_layers", "depth")  # fmt: skip
FEWEST_LAYERS = 2
SHARP = 4.5  # nats; guessing has log(299) = 5.7
QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# what a model type needs beyond SIZES
TYPES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1], "num_hidden_layers": 3},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "use_cache": False,  # transformers can't make its cache
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 32,
        },
    },
    # with more tokens than that, equal tokens tie for a place in its first layer, and the length of the row decides
    "doge": {"keep_window_size": CONTEXT},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_hidden_layers": 3,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mistral4": {"head_dim": 12},  # from which it takes the share that is rotated
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "moshi": {"audio_vocab_size": 64, "sliding_window": CONTEXT},  # as in the real one; else its cache loses tokens
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 16},
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "qwen4_exp_text": QWEN4_INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 99},
    "xlm": {"causal": True},
    "xlstm": {"chunk_size": 64, "hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
        "mamba_headdim": 8,
        "kv_channels": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# what an encoder-decoder or an encoder needs: a start token, and sizes that only they have
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    # a start token that is not the pad token, from which these read positions and masks
    **{
        name: {"decoder_start_token_id": BOS}
        for name in ("m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2", "t5gemma")
    },
    "t5gemma2": {
        "decoder_start_token_id": BOS,
        "eoi_token_index": VOCABULARY - 2,
        "image_token_index": VOCABULARY - 1,
        "encoder": {
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            }
        },
    },
    "led": {
        "attention_window": 8,
        "max_encoder_position_embeddings": CONTEXT,
        "max_decoder_position_embeddings": CONTEXT,
    },
    "fsmt": {"decoder_start_token_id": BOS, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "marian": {"decoder_start_token_id": PAD, "decoder_vocab_size": VOCABULARY},
    "prophetnet": {"decoder_start_token_id": BOS, "ngram": 2},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": PAD, "mask_token_id": VOCABULARY - 1},
    # four places of a box, its height and its width make up the hidden size
    "layoutlmv3": {"hidden_size": 48, "coordinate_size": 8, "shape_size": 8},
    "lilt": {"hidden_size": 48},
}


def tiny_config(model_type: str, kind: str = "decoder") -> PreTrainedConfig:
    """The config of a tiny model of this type.

    Args:
        kind: `decoder`, `encoder-decoder` or `encoder`.
    """
    if model_type == "encoder-decoder":
        parts = [tiny_config("bert", "encoder") for _ in range(2)]
        return EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=BOS, pad_token_id=PAD)
    more = {"decoder": {}, "encoder-decoder": ENCODER_DECODERS, "encoder": ENCODERS}[kind].get(model_type, {})
    if kind == "encoder-decoder" and CONFIG_MAPPING[model_type]().is_encoder_decoder:
        more = {"decoder_start_token_id": PAD, **more}
    config_class = CONFIG_MAPPING[model_type]
    looks_ahead = {"is_decoder": False} if kind == "encoder" and hasattr(config_class(), "is_decoder") else {}
    return _shrunk(config_class, {**TYPES.get(model_type, {}), **looks_ahead, **more})


def _shrunk(config_class: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    there = default.to_dict()
    fixed = {name for name in SIZES if getattr(getattr(config_class, name, None), "fset", True) is None}
    settings = {name: value for name, value in SIZES.items() if there.get(name) is not None and name not in fixed}
    if "kv_lora_rank" in settings:  # all heads share latent keys and values
        settings |= {"num_key_value_heads": 4, "head_dim": settings["qk_rope_head_dim"]}
    settings |= _layers(default)
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is None:
            continue
        if name in changes and not hasattr(part, "vocab_size") and not part.sub_configs:
            settings[name] = changes[name]
            continue
        settings[name] = _shrunk(type(part), changes.get(name, {})).to_dict()
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    settings |= {name: value for name, value in special.items() if name in there}
    if "is_decoder" in there and not default.is_encoder_decoder:
        settings["is_decoder"] = True  # of the BERT kind, which else looks ahead
    settings |= {name: value for name, value in changes.items() if name not in config_class.sub_configs}
    return config_class(**settings)


def _layers(default: PreTrainedConfig) -> dict[str, Any]:
    """The number of layers, and the lists that have one entry per layer: one layer of each kind."""
    there = default.to_dict()
    counts = {name: there[name] for name in LAYERS if isinstance(there.get(name), int)}
    if not counts:
        return {}
    count = next(iter(counts.values()))
    lists = {
        key: value for key, value in there.items()
        if isinstance(value, list) and len(value) == count and count > 1
    }  # fmt: skip
    kinds = list(zip(*lists.values(), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept += [number for number in range(count) if number not in kept][: max(0, FEWEST_LAYERS - len(kept))]
    few = {key: [value[number] for number in sorted(kept)] for key, value in lists.items()}
    return {**few, **dict.fromkeys(counts, len(kept))}


def tiny_model(model_type: str, kind: str = "decoder", seed: int = 1) -> PreTrainedModel:
    """A random float32 model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, kind)
    if kind == "encoder":
        whole = type(config) in AutoModelForMaskedLM._model_mapping
        return (AutoModelForMaskedLM if whole else AutoModel).from_config(config, dtype=torch.float32)
    auto_class = AutoModelForCausalLM if kind == "decoder" else AutoModelForSeq2SeqLM
    model = auto_class.from_config(config, dtype=torch.float32)
    if config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = config.decoder_start_token_id
    sharpen(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Scale the matrices, then the head until the entropy of the predictions is well below that of guessing."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.std() < 0.1:  # a matrix that was drawn, and nothing made for its place
            parameter.mul_(6.0)
    ids = torch.randint(BOS + 2, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    head = model.get_output_embeddings()
    for _ in range(20):
        logprobs = model.eval()(**inputs).logits.float().log_softmax(-1)
        if head is None or -(logprobs.exp() * logprobs).sum(-1).mean() < SHARP:
            break
        head.weight.mul_(1.5)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and unused ones up to VOCABULARY."""
    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused{number}>" for number in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        padding_side="left", model_max_length=CONTEXT,
    )  # fmt: skip
