"""Language models and their adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .model import Model, image, tokens


def peft_models() -> Mapping[str, Model]:
    import peft
    import transformers

    llama = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    linears = {"target_modules": ["q_proj", "v_proj"]}
    feedforward = {"target_modules": ["q_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

    def model(config: Callable[[], Any]) -> Model:
        def make() -> nn.Module:
            base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
            return peft.get_peft_model(base, config())

        return Model(make, lambda m: m(tokens()).logits)

    configurations = {
        "LoRA": lambda: peft.LoraConfig(**linears),
        "LoRA, rank-stabilized, embedding": lambda: peft.LoraConfig(
            target_modules=["embed_tokens", "v_proj"], use_rslora=True
        ),
        "LoRA, gaussian": lambda: peft.LoraConfig(init_lora_weights="gaussian", **linears),
        "LoRA, orthogonal": lambda: peft.LoraConfig(init_lora_weights="orthogonal", **linears),
        "LoRA, OLoRA": lambda: peft.LoraConfig(init_lora_weights="olora", **linears),
        "LoRA, PiSSA": lambda: peft.LoraConfig(init_lora_weights="pissa", **linears),
        "LoRA, with modules to save": lambda: peft.LoraConfig(modules_to_save=["lm_head"], **linears),
        "DoRA": lambda: peft.LoraConfig(use_dora=True, **linears),
        "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **linears),
        "VeRA": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"]),
        "RandLora": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj"]),
        "RandLora, sparse": lambda: peft.RandLoraConfig(r=4, sparse=True, target_modules=["q_proj"]),
        "FourierFT": lambda: peft.FourierFTConfig(n_frequency=20, **linears),
        "IA3": lambda: peft.IA3Config(**feedforward),
        "LoHa": lambda: peft.LoHaConfig(**linears),
        "LoKr": lambda: peft.LoKrConfig(**linears),
        "OFT": lambda: peft.OFTConfig(oft_block_size=8, **linears),
        "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, **linears),
        "HRA": lambda: peft.HRAConfig(r=4, **linears),
        "Bone": lambda: peft.MissConfig(r=8, init_weights="bat", **linears),
        "MiSS": lambda: peft.MissConfig(r=8, **linears),
        "VB-LoRA": lambda: peft.VBLoRAConfig(num_vectors=16, vector_length=8, **linears),
        "XLoRA": lambda: peft.LoraConfig(use_rslora=True, **linears),
        "LN tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        "C3A": lambda: peft.C3AConfig(block_size=8, **linears),
        "SHiRA": lambda: peft.ShiraConfig(r=4, **linears),
        "trainable tokens": lambda: peft.TrainableTokensConfig(
            token_indices=[1, 5, 9], target_modules=["embed_tokens"]
        ),
        "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "P-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
        ),
        "road": lambda: peft.RoadConfig(group_size=8, **linears),
        "WaveFT": lambda: peft.WaveFTConfig(n_frequency=20, **linears),
    }
    return {name: model(configuration) for name, configuration in configurations.items()}


def litgpt_models() -> Mapping[str, Model]:
    import litgpt

    small = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "padded_vocab_size": 64, "block_size": 32}

    def model(name: str, **options: Any) -> Model:
        def make() -> nn.Module:
            return litgpt.GPT(litgpt.Config.from_name(name, **{**small, **options}))

        return Model(make, lambda m: m(tokens()))

    return {
        "pythia": model("pythia-14m"),
        "Llama 3.2": model("Llama-3.2-1B", n_query_groups=1, intermediate_size=48, head_size=16),
        "Gemma 2": model("Gemma-2-2b", n_query_groups=1, intermediate_size=48, head_size=16),
        "Mixtral": model("Mixtral-8x7B-v0.1", n_query_groups=1, intermediate_size=48, n_expert=4),
        "Qwen 3": model("Qwen3-0.6B", n_query_groups=1, intermediate_size=48, head_size=16),
        "Phi": model("phi-2", intermediate_size=48),
    }


def x_transformers_models() -> Mapping[str, Model]:
    import x_transformers as x

    def model(**options: Any) -> Model:
        return Model(
            lambda: x.TransformerWrapper(
                num_tokens=64,
                max_seq_len=32,
                attn_layers=x.Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, **options),
            ),
            lambda m: m(tokens()),
        )

    return {
        "decoder": model(),
        "rotary": model(rotary_pos_emb=True),
        "rotary, xpos": model(rotary_xpos=True),
        "alibi": model(alibi_pos_bias=True),
        "relative positions": model(rel_pos_bias=True),
        "dynamic positions": model(dynamic_pos_bias=True),
        "memory keys and values": model(attn_num_mem_kv=4),
        "gated, GLU, RMSNorm": model(attn_gate_values=True, ff_glu=True, use_rmsnorm=True),
        "sandwich norm, scaled residuals": model(sandwich_norm=True, scale_residual=True, residual_attn=True),
        "normalized queries and keys": model(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
        "talking heads": model(attn_pre_talking_heads=True),
        "one head of keys and values": model(attn_one_kv_head=True),
        "hyper connections": model(num_residual_streams=2),
        "layer dropout": model(layer_dropout=0.1, shift_tokens=1),
        "memory tokens, tied": Model(
            lambda: x.TransformerWrapper(
                num_tokens=64,
                max_seq_len=32,
                num_memory_tokens=2,
                tie_embedding=True,
                scaled_sinu_pos_emb=True,
                attn_layers=x.Encoder(dim=32, depth=1, heads=2),
            ),
            lambda m: m(tokens()),
        ),
        "ViT": Model(
            lambda: x.ViTransformerWrapper(
                image_size=32, patch_size=8, num_classes=10, attn_layers=x.Encoder(dim=32, depth=1, heads=2)
            ),
            lambda m: m(image(32)),
        ),
        "XTransformer": Model(
            lambda: x.XTransformer(
                dim=32,
                enc_num_tokens=64,
                enc_depth=1,
                enc_heads=2,
                enc_max_seq_len=16,
                dec_num_tokens=64,
                dec_depth=1,
                dec_heads=2,
                dec_max_seq_len=16,
            )
        ),
    }


def sentence_transformers_models() -> Mapping[str, Model]:
    from sentence_transformers import models as modules

    return {
        "Dense and Normalize": Model(lambda: nn.Sequential(modules.Dense(16, 8), modules.Normalize())),
        "LSTM": Model(lambda: modules.LSTM(16, 8)),
        "WeightedLayerPooling": Model(lambda: modules.WeightedLayerPooling(16, num_hidden_layers=4)),
        "LayerNorm": Model(lambda: modules.LayerNorm(16)),
        "CNN": Model(lambda: modules.CNN(16, 8)),
    }
