"""Diffusion models and quantized codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .model import Model, image


def diffusers_models() -> Mapping[str, Model]:
    import diffusers

    attention = {"attention_head_dim": 8, "num_attention_heads": 2}
    blocks = {"block_out_channels": (32, 32), "norm_num_groups": 8}
    time = torch.tensor([3, 7])

    def text(width: int = 16) -> torch.Tensor:
        return torch.randn(2, 5, width)

    unet = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        **blocks,
    }
    vae = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return {
        "UNet2DModel": Model(
            lambda: diffusers.UNet2DModel(
                sample_size=16,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                **blocks,
            ),
            lambda m: m(image(16), time).sample,
        ),
        "UNet2DConditionModel": Model(
            lambda: diffusers.UNet2DConditionModel(sample_size=16, attention_head_dim=8, **unet),
            lambda m: m(image(16, 4), time, text()).sample,
        ),
        "ControlNetModel": Model(
            lambda: diffusers.ControlNetModel(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                cross_attention_dim=16,
                conditioning_embedding_out_channels=(16, 32),
                **blocks,
            )
        ),
        "AutoencoderKL": Model(lambda: diffusers.AutoencoderKL(**vae, **blocks), lambda m: m(image(16)).sample),
        "VQModel": Model(lambda: diffusers.VQModel(num_vq_embeddings=32, **vae, **blocks)),
        "AutoencoderDC": Model(
            lambda: diffusers.AutoencoderDC(
                encoder_block_out_channels=(16, 32),
                decoder_block_out_channels=(16, 32),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                encoder_block_types="ResBlock",
                decoder_block_types="ResBlock",
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                attention_head_dim=8,
            ),
        ),
        "DiTTransformer2DModel": Model(
            lambda: diffusers.DiTTransformer2DModel(num_layers=1, sample_size=8, norm_num_groups=8, **attention),
            lambda m: m(image(8, 4), time, class_labels=torch.tensor([1, 2])).sample,
        ),
        "PixArtTransformer2DModel": Model(
            lambda: diffusers.PixArtTransformer2DModel(
                num_layers=1, sample_size=8, norm_num_groups=8, cross_attention_dim=16, caption_channels=16, **attention
            )
        ),
        "SD3Transformer2DModel": Model(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=8,
                num_layers=1,
                joint_attention_dim=16,
                caption_projection_dim=16,
                pooled_projection_dim=16,
                pos_embed_max_size=8,
                **attention,
            ),
            lambda m: m(image(8, 16), text(), torch.randn(2, 16), time).sample,
        ),
        "FluxTransformer2DModel": Model(
            lambda: diffusers.FluxTransformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(2, 2, 4),
                **attention,
            ),
            lambda m: (
                m(torch.randn(2, 6, 4), text(), torch.randn(2, 16), time, torch.zeros(6, 3), torch.zeros(5, 3)).sample
            ),
        ),
        "AuraFlowTransformer2DModel": Model(
            lambda: diffusers.AuraFlowTransformer2DModel(
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                joint_attention_dim=16,
                caption_projection_dim=16,
                pos_embed_max_size=16,
                **attention,
            )
        ),
        "CogVideoXTransformer3DModel": Model(
            lambda: diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                text_embed_dim=16,
                sample_width=8,
                sample_height=8,
                sample_frames=5,
                time_embed_dim=8,
            )
        ),
        "HunyuanDiT2DModel": Model(
            lambda: diffusers.HunyuanDiT2DModel(
                num_layers=2,
                sample_size=8,
                patch_size=2,
                hidden_size=16,
                in_channels=4,
                mlp_ratio=2.0,
                cross_attention_dim=16,
                cross_attention_dim_t5=16,
                pooled_projection_dim=8,
                text_len=4,
                text_len_t5=4,
                **attention,
            )
        ),
        "HunyuanVideoTransformer3DModel": Model(
            lambda: diffusers.HunyuanVideoTransformer3DModel(
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=16,
                pooled_projection_dim=8,
                rope_axes_dim=(2, 2, 4),
                **attention,
            )
        ),
        "LTXVideoTransformer3DModel": Model(
            lambda: diffusers.LTXVideoTransformer3DModel(
                in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=16, caption_channels=16, **attention
            )
        ),
        "WanTransformer3DModel": Model(
            lambda: diffusers.WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=32,
                num_layers=1,
            ),
            lambda m: m(torch.randn(1, 4, 1, 8, 8), torch.tensor([3]), text()[:1]).sample,
        ),
        "MochiTransformer3DModel": Model(
            lambda: diffusers.MochiTransformer3DModel(
                num_layers=2, pooled_projection_dim=8, in_channels=4, text_embed_dim=16, time_embed_dim=8, **attention
            )
        ),
        "SanaTransformer2DModel": Model(
            lambda: diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
                sample_size=8,
                **attention,
            )
        ),
        "PriorTransformer": Model(
            lambda: diffusers.PriorTransformer(num_layers=1, embedding_dim=16, num_embeddings=4, **attention)
        ),
        "StableCascadeUNet": Model(
            lambda: diffusers.StableCascadeUNet(
                block_out_channels=(32, 32),
                down_num_layers_per_block=(1, 1),
                up_num_layers_per_block=(1, 1),
                num_attention_heads=(0, 4),
                conditioning_dim=32,
                down_blocks_repeat_mappers=(1, 1),
                up_blocks_repeat_mappers=(1, 1),
                block_types_per_layer=(("SDCascadeResBlock",), ("SDCascadeAttnBlock",)),
                kernel_size=3,
                clip_text_in_channels=16,
                clip_text_pooled_in_channels=16,
                clip_image_in_channels=16,
                switch_level=(False,),
                dropout=(0.1, 0.1),
                self_attn=True,
                patch_size=1,
                in_channels=4,
                out_channels=4,
                timestep_ratio_embedding_dim=16,
            )
        ),
        "T5FilmDecoder": Model(
            lambda: diffusers.models.T5FilmDecoder(
                input_dims=16, targets_length=8, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16
            )
        ),
        "MotionAdapter": Model(
            lambda: diffusers.MotionAdapter(
                block_out_channels=(32, 32), motion_norm_num_groups=8, motion_num_attention_heads=2
            )
        ),
        "ConsistencyDecoderVAE": Model(
            lambda: diffusers.ConsistencyDecoderVAE(
                encoder_block_out_channels=(32, 32),
                encoder_down_block_types=("DownEncoderBlock2D",) * 2,
                encoder_layers_per_block=1,
                decoder_block_out_channels=(32, 32),
                decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
                decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
                decoder_layers_per_block=1,
            )
        ),
        "UNet1DModel": Model(
            lambda: diffusers.UNet1DModel(
                block_out_channels=(32, 32),
                down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
                up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
                sample_size=32,
            )
        ),
    }


def denoising_diffusion_pytorch_models() -> Mapping[str, Model]:
    import denoising_diffusion_pytorch as ddp

    def unet() -> nn.Module:
        return ddp.Unet(dim=8, dim_mults=(1, 2), flash_attn=False)

    return {
        "Unet": Model(unet, lambda m: m(image(16), torch.tensor([3, 7]))),
        "GaussianDiffusion": Model(lambda: ddp.GaussianDiffusion(unet(), image_size=16, timesteps=20)),
        "learned sinusoids": Model(lambda: ddp.Unet(dim=8, dim_mults=(1, 2), learned_sinusoidal_cond=True)),
        "GaussianDiffusion1D": Model(
            lambda: ddp.GaussianDiffusion1D(
                ddp.Unet1D(dim=8, dim_mults=(1, 2), channels=2), seq_length=16, timesteps=20
            )
        ),
    }


def vector_quantize_pytorch_models() -> Mapping[str, Model]:
    import vector_quantize_pytorch as vq

    codes = {"dim": 16, "codebook_size": 32}

    def sequence(m: nn.Module) -> Any:
        return m(torch.randn(2, 8, 16))

    return {
        "VectorQuantize": Model(lambda: vq.VectorQuantize(**codes), sequence),
        "VectorQuantize, cosine": Model(lambda: vq.VectorQuantize(use_cosine_sim=True, **codes), sequence),
        "VectorQuantize, k-means": Model(lambda: vq.VectorQuantize(kmeans_init=True, **codes)),
        "VectorQuantize, rotation": Model(
            lambda: vq.VectorQuantize(rotation_trick=True, orthogonal_reg_weight=1.0, **codes)
        ),
        "ResidualVQ": Model(lambda: vq.ResidualVQ(num_quantizers=2, **codes), sequence),
        "GroupedResidualVQ": Model(lambda: vq.GroupedResidualVQ(num_quantizers=2, groups=2, **codes)),
        "RandomProjectionQuantizer": Model(
            lambda: vq.RandomProjectionQuantizer(dim=16, num_codebooks=2, codebook_dim=8, codebook_size=16)
        ),
        "FSQ": Model(lambda: vq.FSQ([8, 5, 5, 5]), lambda m: m(torch.randn(2, 8, 4))),
        "ResidualFSQ": Model(lambda: vq.ResidualFSQ(dim=16, levels=[8, 5, 5], num_quantizers=2), sequence),
        "LFQ": Model(lambda: vq.LFQ(codebook_size=16, dim=4)),
        "SimVQ": Model(lambda: vq.SimVQ(**codes), sequence),
        "LatentQuantize": Model(lambda: vq.LatentQuantize(levels=[5, 5, 8], dim=16)),
    }
