"""Small models of other libraries, by configuration alone: each a constructor and, for most, a call of the model.

A function for each library imports it and returns its models by name. `make test-libraries` installs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Model(NamedTuple):
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Any] | None = None  # inputs are made in the default dtype, which is the model's


def image(size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def tokens(length: int = 16, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(vocabulary, (2, length))


if torch.version.cuda is None:
    # torchvision's wheel does not load its operators beside a torch without CUDA, and for want of these two cannot be
    # imported. No model here calls them.
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def timm_models() -> Mapping[str, Model]:
    import timm
    from timm import layers

    def model(name: str, size: int = 64, **options: Any) -> Model:
        return Model(lambda: timm.create_model(name, **options), lambda m: m(image(size)))

    vit = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}

    def maps(m: nn.Module) -> Any:
        return m(torch.randn(2, 32, 8, 8))

    def sequence(m: nn.Module) -> Any:
        return m(torch.randn(2, 16, 32))

    return {
        "resnet18": model("resnet18"),
        "efficientnet_b0": model("efficientnet_b0"),
        "convnext_atto": model("convnext_atto"),
        "vit": model("vit_tiny_patch16_224", 32, **vit),
        "vit, jax init": model("vit_tiny_patch16_224", 32, weight_init="jax", **vit),
        "vit, attention pool": model("vit_base_patch16_siglip_224", 32, **vit),
        "eva02, rotary": model("eva02_tiny_patch14_224", 32, **{**vit, "patch_size": 8}),
        "swin": model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1)),
        "swinv2": model("swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1)),
        "mixer": model("mixer_s32_224", 224, embed_dim=32, num_blocks=2, num_classes=10),
        "maxvit": model("maxvit_rmlp_pico_rw_256", 64, img_size=64, embed_dim=(16, 32, 32, 32), depths=(1, 1, 1, 1)),
        "AttentionPool2d": Model(lambda: layers.AttentionPool2d(32, feat_size=8, num_heads=2), maps),
        "RotAttentionPool2d": Model(lambda: layers.RotAttentionPool2d(32, ref_feat_size=8, num_heads=2), maps),
        "AttentionPoolLatent": Model(lambda: layers.AttentionPoolLatent(32, num_heads=2, latent_len=2), sequence),
        "AttentionPoolLatent, positions": Model(
            lambda: layers.AttentionPoolLatent(32, num_heads=2, pos_embed="abs", feat_size=16), sequence
        ),
    }


def torchvision_models() -> Mapping[str, Model]:
    from torchvision import models

    def swin(name: str) -> Model:
        version_2 = (
            {
                "block": models.swin_transformer.SwinTransformerBlockV2,
                "downsample_layer": models.swin_transformer.PatchMergingV2,
            }
            if name.endswith("V2")
            else {}
        )
        return Model(
            lambda: models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=10, **version_2),
            lambda m: m(image()),
        )

    def model(name: str, **options: Any) -> Model:
        return Model(lambda: models.get_model(name, weights=None, num_classes=10, **options), lambda m: m(image()))

    return {
        **{
            name: model(name)
            for name in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5")
        },
        **{name: model(name) for name in ("regnet_y_400mf", "efficientnet_b0", "densenet121")},
        "googlenet": model("googlenet", init_weights=True),
        "swin": swin("SwinTransformer"),
        "swin v2": swin("SwinTransformerV2"),
        "vit_b_32": Model(
            lambda: models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), lambda m: m(image(32))
        ),
        "maxvit": Model(
            lambda: models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=10), lambda m: m(image())
        ),
    }


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
        "LoRA, rank-stabilised, embedding": lambda: peft.LoraConfig(
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


def torch_geometric_models() -> Mapping[str, Model]:
    from torch_geometric import nn as pyg

    def edges() -> Any:
        return torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])

    def graph(m: nn.Module) -> Any:
        return m(torch.randn(4, 8), edges())

    convolutions = {
        name: Model(lambda name=name: getattr(pyg, name)(8, 6), graph)
        for name in (
            "GCNConv",
            "SAGEConv",
            "GATConv",
            "GATv2Conv",
            "TransformerConv",
            "TAGConv",
            "SGConv",
            "ARMAConv",
            "GraphConv",
            "ResGatedGraphConv",
            "SuperGATConv",
            "ClusterGCNConv",
            "GENConv",
            "LEConv",
            "MFConv",
            "FiLMConv",
        )
    }
    interactions = {"hidden_channels": 16, "out_channels": 1, "num_blocks": 1, "num_spherical": 2, "num_radial": 2}
    return {
        **convolutions,
        "EGConv": Model(lambda: pyg.EGConv(8, 16), graph),
        "ChebConv": Model(lambda: pyg.ChebConv(8, 6, 3), graph),
        "RGCNConv, bases": Model(lambda: pyg.RGCNConv(8, 6, 3, num_bases=2)),
        "RGATConv": Model(lambda: pyg.RGATConv(8, 6, 3)),
        "GPSConv": Model(lambda: pyg.GPSConv(8, pyg.GCNConv(8, 8), heads=2), graph),
        "GPSConv, performer": Model(lambda: pyg.GPSConv(8, pyg.GCNConv(8, 8), heads=2, attn_type="performer")),
        "HGTConv": Model(lambda: pyg.HGTConv(8, 6, (["a", "b"], [("a", "to", "b")]), heads=2)),
        "HANConv": Model(lambda: pyg.HANConv(8, 6, (["a", "b"], [("a", "to", "b")]), heads=2)),
        "PNAConv": Model(
            lambda: pyg.PNAConv(8, 6, ["mean", "max"], ["identity", "attenuation"], torch.tensor([0, 2, 3]))
        ),
        "GCN": Model(lambda: pyg.GCN(8, 16, 2, 4), graph),
        "GIN": Model(lambda: pyg.GIN(8, 16, 2, 4), graph),
        "DeepGCNLayer": Model(lambda: pyg.DeepGCNLayer(pyg.GENConv(8, 8), nn.LayerNorm(8), nn.ReLU())),
        "AttentiveFP": Model(lambda: pyg.AttentiveFP(8, 16, 4, 3, 2, 2)),
        "SchNet": Model(lambda: pyg.SchNet(16, 16, 2, 8)),
        "DimeNet": Model(lambda: pyg.DimeNet(num_bilinear=2, **interactions)),
        "DimeNet++": Model(
            lambda: pyg.DimeNetPlusPlus(int_emb_size=8, basis_emb_size=4, out_emb_channels=16, **interactions)
        ),
        "ViSNet": Model(lambda: pyg.models.ViSNet(hidden_channels=16, num_heads=2, num_layers=2, num_rbf=8)),
        "MetaPath2Vec": Model(lambda: pyg.MetaPath2Vec({("a", "to", "a"): edges()}, 8, [("a", "to", "a")], 2, 2)),
        "TransE": Model(lambda: pyg.TransE(10, 3, 8)),
        "ComplEx": Model(lambda: pyg.ComplEx(10, 3, 8)),
        "RotatE": Model(lambda: pyg.RotatE(10, 3, 8)),
        "LightGCN": Model(lambda: pyg.LightGCN(10, 8, 2)),
        "LINKX": Model(lambda: pyg.LINKX(4, 8, 16, 4, 2)),
        "Polynormer": Model(lambda: pyg.Polynormer(8, 16, 4)),
        "Set2Set": Model(lambda: pyg.Set2Set(8, 2)),
        "GraphMultisetTransformer": Model(lambda: pyg.GraphMultisetTransformer(8, 2, heads=2)),
        "HeteroDictLinear": Model(lambda: pyg.HeteroDictLinear(8, 6, ["a", "b"])),
        "lazy GCN": Model(lambda: pyg.GCNConv(-1, 6)),
        "lazy Linear": Model(lambda: pyg.Linear(-1, 6)),
    }


def e3nn_models() -> Mapping[str, Model]:
    from e3nn import nn as e3nn_nn
    from e3nn import o3

    grid = {"res": (10, 9)}
    return {
        "Linear": Model(lambda: o3.Linear("4x0e + 2x1o", "3x0e + 2x1o"), lambda m: m(torch.randn(2, 10))),
        "TensorProduct": Model(
            lambda: o3.FullyConnectedTensorProduct("2x0e + 1x1o", "0e + 1o", "2x0e + 1x1o"),
            lambda m: m(torch.randn(2, 5), torch.randn(2, 4)),
        ),
        "FullTensorProduct": Model(
            lambda: o3.FullTensorProduct("1x0e + 1x1o", "1x0e + 1x1o"),
            lambda m: m(torch.randn(2, 4), torch.randn(2, 4)),
        ),
        "ToS2Grid": Model(lambda: o3.ToS2Grid(3, **grid), lambda m: m(torch.randn(2, 16))),
        "FromS2Grid": Model(lambda: o3.FromS2Grid((10, 9), 3), lambda m: m(torch.randn(2, 10, 9))),
        "S2Activation": Model(
            lambda: e3nn_nn.S2Activation("0e + 1o + 2e", torch.tanh, 10), lambda m: m(torch.randn(2, 9))
        ),
        "SphericalHarmonics": Model(lambda: o3.SphericalHarmonics([0, 1, 2], True), lambda m: m(torch.randn(2, 3))),
        "ReducedTensorProducts": Model(lambda: o3.ReducedTensorProducts("ij=ji", i="1o")),
        "Gate": Model(
            lambda: e3nn_nn.Gate("4x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o"), lambda m: m(torch.randn(2, 12))
        ),
        "BatchNorm": Model(lambda: e3nn_nn.BatchNorm("4x0e + 2x1o"), lambda m: m(torch.randn(2, 10))),
        "FullyConnectedNet": Model(
            lambda: e3nn_nn.FullyConnectedNet([4, 16, 2], torch.relu), lambda m: m(torch.randn(2, 4))
        ),
    }


def gpytorch_models() -> Mapping[str, Model]:
    import gpytorch
    from gpytorch import kernels

    class Exact(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            x, y = torch.linspace(0, 1, 8), torch.linspace(0, 1, 8).sin()
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = kernels.ScaleKernel(kernels.RBFKernel())

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    class Variational(gpytorch.models.ApproximateGP):
        def __init__(self, distribution: str, points: int = 6) -> None:
            chosen = getattr(gpytorch.variational, distribution)(points)
            super().__init__(gpytorch.variational.VariationalStrategy(self, torch.randn(points, 2), chosen))
            self.mean_module, self.covar_module = (
                gpytorch.means.LinearMean(2),
                kernels.ScaleKernel(kernels.MaternKernel(ard_num_dims=2)),
            )

        def forward(self, x: torch.Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def prior() -> Any:
        return gpytorch.priors.GammaPrior(3.0, 6.0)

    return {
        "ExactGP": Model(Exact),
        **{
            name: Model(lambda name=name: Variational(name))
            for name in (
                "CholeskyVariationalDistribution",
                "MeanFieldVariationalDistribution",
                "NaturalVariationalDistribution",
                "TrilNaturalVariationalDistribution",
            )
        },
        "SpectralMixtureKernel": Model(lambda: kernels.SpectralMixtureKernel(num_mixtures=3)),
        "PeriodicKernel": Model(lambda: kernels.PeriodicKernel(lengthscale_prior=prior())),
        "RFFKernel": Model(lambda: kernels.RFFKernel(num_samples=8, num_dims=2)),
        "IndexKernel": Model(lambda: kernels.IndexKernel(num_tasks=3, rank=2)),
        "MultitaskKernel": Model(lambda: kernels.MultitaskKernel(kernels.RBFKernel(), num_tasks=2)),
        "GridInterpolationKernel": Model(
            lambda: kernels.GridInterpolationKernel(
                kernels.RBFKernel(), grid_size=8, num_dims=1, grid_bounds=[(0.0, 1.0)]
            )
        ),
        "InducingPointKernel": Model(
            lambda: kernels.InducingPointKernel(
                kernels.RBFKernel(), torch.randn(4, 2), gpytorch.likelihoods.GaussianLikelihood()
            )
        ),
        "RBFKernel with priors": Model(
            lambda: kernels.ScaleKernel(
                kernels.RBFKernel(
                    lengthscale_prior=prior(), lengthscale_constraint=gpytorch.constraints.Interval(0.1, 2.0)
                ),
                outputscale_prior=prior(),
            )
        ),
        "MultitaskGaussianLikelihood": Model(
            lambda: gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, rank=1)
        ),
        "LKJ prior": Model(
            lambda: gpytorch.priors.LKJCovariancePrior(2, 1.0, gpytorch.priors.SmoothedBoxPrior(0.1, 2.0))
        ),
    }


def botorch_models() -> Mapping[str, Model]:
    from botorch import models

    double = {"dtype": torch.float64}

    def x() -> Any:
        return torch.linspace(0, 1, 12, **double).view(6, 2)

    def y() -> Any:
        return x().sum(-1, keepdim=True).sin()

    return {
        "SingleTaskGP": Model(lambda: models.SingleTaskGP(x(), y())),
        "MultiTaskGP": Model(
            lambda: models.MultiTaskGP(
                torch.cat([x(), torch.tensor([[0.0], [1.0]] * 3, **double)], -1), y(), task_feature=-1
            )
        ),
        "MixedSingleTaskGP": Model(lambda: models.MixedSingleTaskGP(x().round(), y(), cat_dims=[1])),
        "SingleTaskVariationalGP": Model(lambda: models.SingleTaskVariationalGP(x(), y(), inducing_points=4).model),
        "KroneckerMultiTaskGP": Model(lambda: models.KroneckerMultiTaskGP(x(), torch.cat([y(), y()], -1))),
        "ModelListGP": Model(lambda: models.ModelListGP(models.SingleTaskGP(x(), y()), models.SingleTaskGP(x(), y()))),
    }


def geoopt_models() -> Mapping[str, Model]:
    import geoopt

    def parameter(manifold: Any, *shape: int, draw: str = "random") -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            module = nn.Module()
            module.manifold = manifold()
            module.weight = geoopt.ManifoldParameter(getattr(module.manifold, draw)(*shape), manifold=module.manifold)
            module.origin = geoopt.ManifoldTensor(torch.zeros(3), manifold=geoopt.Euclidean())
            return module

        return make

    return {
        "PoincareBall": Model(parameter(geoopt.PoincareBall, 4, 8)),
        "PoincareBall, learnable": Model(parameter(lambda: geoopt.PoincareBall(c=0.5, learnable=True), 4, 8)),
        "Lorentz": Model(parameter(geoopt.Lorentz, 4, 8, draw="random_normal")),
        "Sphere": Model(parameter(geoopt.Sphere, 4, 8)),
        "Stiefel": Model(parameter(geoopt.Stiefel, 8, 4)),
        "CanonicalStiefel": Model(parameter(geoopt.CanonicalStiefel, 8, 4)),
        "SymmetricPositiveDefinite": Model(parameter(geoopt.SymmetricPositiveDefinite, 4, 4)),
        "Euclidean": Model(parameter(geoopt.Euclidean, 4, 8)),
        "BirkhoffPolytope": Model(parameter(geoopt.BirkhoffPolytope, 4, 4)),
        "ProductManifold": Model(
            parameter(lambda: geoopt.ProductManifold((geoopt.Sphere(), 4), (geoopt.PoincareBall(), 4)), 3, 8)
        ),
    }


LIBRARIES: dict[str, Callable[[], Mapping[str, Model]]] = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "peft": peft_models,
    "diffusers": diffusers_models,
    "torch_geometric": torch_geometric_models,
    "e3nn": e3nn_models,
    "gpytorch": gpytorch_models,
    "botorch": botorch_models,
    "geoopt": geoopt_models,
}

# What differs from torch for a reason, by library, model and mode.
_GENERATOR = "drawn in bf16 from a generator of the library's own: torch's numbers, which are others in bf16"
KNOWN = {
    ("peft", "VeRA", "bf16"): _GENERATOR,
    ("peft", "RandLora, sparse", "bf16"): _GENERATOR,
    ("peft", "RandLora", "device"): "the library draws and divides in bf16, which it names; fastinit divides in fp32",
}
