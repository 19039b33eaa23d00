"""Images and volumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .model import Model, image, tokens


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
        "mixer": Model(
            lambda: timm.models.mlp_mixer.MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=32),
            lambda m: m(image(32)),
        ),
        "maxvit": model("maxvit_rmlp_pico_rw_256", 64, img_size=64, embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1)),
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


def vit_pytorch_models() -> Mapping[str, Model]:
    import importlib

    small = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 32}

    def model(module: str, name: str, size: int = 32, **options: Any) -> Model:
        return Model(
            lambda: getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**options), lambda m: m(image(size))
        )

    stages = {"num_classes": 10, "dim": (16, 32, 32, 32), "depth": (1, 1, 1, 1)}
    return {
        "ViT": model("vit", "ViT", **small),
        "SimpleViT": model("simple_vit", "SimpleViT", **small),
        "SimpleViT, register tokens": model("simple_vit_with_register_tokens", "SimpleViT", **small),
        "NaViT": Model(model("na_vit", "NaViT", **small).make),
        "CaiT": model("cait", "CaiT", cls_depth=1, **small),
        "DeepViT": model("deepvit", "DeepViT", **small),
        "RvT": model("rvt", "RvT", **small),
        "T2TViT": model("t2t", "T2TViT", image_size=32, num_classes=10, dim=32, depth=1, heads=2, mlp_dim=32),
        "CCT": model("cct", "CCT", img_size=32, embedding_dim=32, num_layers=1, num_heads=2, num_classes=10),
        "LeViT": model(
            "levit", "LeViT", 64, image_size=64, num_classes=10, dim=(32, 32, 32), depth=1, heads=2, mlp_mult=2
        ),
        "CrossViT": Model(
            model(
                "cross_vit",
                "CrossViT",
                image_size=32,
                num_classes=10,
                sm_dim=16,
                lg_dim=16,
                sm_patch_size=8,
                lg_patch_size=16,
                depth=1,
            ).make
        ),
        "PiT": model(
            "pit", "PiT", 64, image_size=64, patch_size=8, num_classes=10, dim=32, depth=(1, 1), heads=2, mlp_dim=32
        ),
        "ScalableViT": Model(
            model(
                "scalable_vit",
                "ScalableViT",
                num_classes=10,
                dim=16,
                heads=(1, 1, 1, 1),
                depth=(1, 1, 1, 1),
                ssa_dim_key=(8, 8, 8, 8),
                reduction_factor=(2, 2, 1, 1),
                window_size=(8, 4, None, None),
            ).make
        ),
        "SepViT": Model(
            model(
                "sep_vit", "SepViT", num_classes=10, dim=16, dim_head=8, heads=(1, 1), depth=(1, 1), window_size=4
            ).make
        ),
        "MaxViT": Model(
            model("max_vit", "MaxViT", num_classes=10, dim=16, dim_head=8, depth=(1, 1), window_size=4).make
        ),
        "CrossFormer": Model(model("crossformer", "CrossFormer", **stages).make),
        "RegionViT": Model(model("regionvit", "RegionViT", **stages).make),
        "MobileViT": Model(
            model(
                "mobile_vit",
                "MobileViT",
                image_size=(64, 64),
                dims=[16, 16, 16],
                channels=[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 16],
                num_classes=10,
            ).make
        ),
        "XCiT": model("xcit", "XCiT", cls_depth=1, local_patch_kernel_size=3, **small),
        "ViT for small datasets": model("vit_for_small_dataset", "ViT", **small),
        "normalized ViT": model("normalized_vit", "nViT", **small),
        "parallel ViT": model("parallel_vit", "ViT", **small),
        "3D ViT": Model(
            model(
                "vit_3d",
                "ViT",
                image_patch_size=8,
                image_size=16,
                frames=4,
                frame_patch_size=2,
                num_classes=10,
                dim=32,
                depth=1,
                heads=2,
                mlp_dim=32,
            ).make
        ),
    }


def open_clip_models() -> Mapping[str, Model]:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    def vision(**options: Any) -> Any:
        return CLIPVisionCfg(
            **{"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32, **options}
        )

    def text(**options: Any) -> Any:
        return CLIPTextCfg(**{"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1, **options})

    def model(cls: Any = CLIP, **options: Any) -> Model:
        return Model(lambda: cls(32, vision(**options), text()), lambda m: m(image(32), tokens()))

    return {
        "CLIP": model(),
        "CLIP, attention pool": model(attentional_pool=True, attn_pooler_heads=2),
        "CLIP, ResNet": Model(
            lambda: CLIP(32, vision(layers=(1, 1, 1, 1), width=16), text()), lambda m: m(image(32), tokens())
        ),
        "CustomTextCLIP": model(CustomTextCLIP),
    }


def segmentation_models_pytorch_models() -> Mapping[str, Model]:
    import segmentation_models_pytorch as smp

    def model(name: str, encoder: str = "timm-mobilenetv3_small_minimal_100", **options: Any) -> Model:
        return Model(
            lambda: getattr(smp, name)(encoder, encoder_weights=None, classes=2, **options), lambda m: m(image())
        )

    channels = (16, 8, 8, 8, 8)
    return {
        "Unet": model("Unet", decoder_channels=channels),
        "MAnet": model("MAnet", decoder_channels=channels, decoder_pab_channels=8),
        "FPN": model("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32),
        "DeepLabV3Plus": model("DeepLabV3Plus", decoder_channels=16),
        "PAN": Model(model("PAN", decoder_channels=8).make),
        "Segformer": model("Segformer", "mit_b0", decoder_segmentation_channels=16),
    }


def monai_models() -> Mapping[str, Model]:
    from monai.networks import nets

    def volume(size: int = 32, channels: int = 1) -> torch.Tensor:
        return torch.randn(1, channels, size, size, size)

    two = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    levels = {"channels": (8, 16), "strides": (2,)}
    return {
        "UNet": Model(lambda: nets.UNet(**two, **levels), lambda m: m(image(32, 1))),
        "BasicUNet": Model(lambda: nets.BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 16, 8)), lambda m: m(image(32, 1))),
        "AttentionUnet": Model(lambda: nets.AttentionUnet(**two, **levels), lambda m: m(image(32, 1))),
        "SegResNet": Model(lambda: nets.SegResNet(2, 8, 1, 2), lambda m: m(image(32, 1))),
        "DynUNet": Model(
            lambda: nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 8, 16]), lambda m: m(image(32, 1))
        ),
        "UNETR": Model(
            lambda: nets.UNETR(1, 2, (32, 32, 32), 8, hidden_size=24, mlp_dim=32, num_heads=2), lambda m: m(volume())
        ),
        "SwinUNETR": Model(
            lambda: nets.SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), spatial_dims=2),
            lambda m: m(image(64, 1)),
        ),
        "ViT": Model(
            lambda: nets.ViT(1, (32, 32), (8, 8), 24, 32, 2, 2, classification=True, spatial_dims=2),
            lambda m: m(image(32, 1)),
        ),
        "DenseNet": Model(lambda: nets.DenseNet(2, 1, 2, 8, 4, (2, 2)), lambda m: m(image(32, 1))),
        "ResNet": Model(
            lambda: nets.ResNet("basic", [1, 1, 1, 1], [8, 8, 16, 16], 2, 1, num_classes=2), lambda m: m(image(32, 1))
        ),
        "EfficientNetBN": Model(lambda: nets.EfficientNetBN("efficientnet-b0", False, False, 2, 1, 2)),
        "VNet": Model(lambda: nets.VNet(2, 1, 2), lambda m: m(image(32, 1))),
        "AutoEncoder": Model(
            lambda: nets.AutoEncoder(**two, channels=(8, 16), strides=(2, 2)), lambda m: m(image(32, 1))
        ),
        "HighResNet": Model(lambda: nets.HighResNet(2, 1, 2), lambda m: m(image(32, 1))),
        "DiffusionModelUNet": Model(
            lambda: nets.DiffusionModelUNet(
                **two,
                channels=(8, 8),
                num_res_blocks=1,
                attention_levels=(False, True),
                norm_num_groups=8,
                num_head_channels=4,
            ),
            lambda m: m(image(16, 1), torch.tensor([3, 7])),
        ),
        "AutoencoderKL": Model(
            lambda: nets.AutoencoderKL(
                **two,
                num_res_blocks=(1, 1),
                channels=(8, 8),
                attention_levels=(False, False),
                latent_channels=2,
                norm_num_groups=8,
            )
        ),
        "VQVAE": Model(
            lambda: nets.VQVAE(
                **two,
                channels=(8, 8),
                num_res_channels=(8, 8),
                num_embeddings=16,
                embedding_dim=8,
                downsample_parameters=((2, 4, 1, 1),) * 2,
                upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            )
        ),
        "DiNTS": Model(lambda: nets.DiNTS(nets.TopologyInstance(spatial_dims=2), 1, 2)),
    }


def kornia_models() -> Mapping[str, Model]:
    import kornia

    return {
        "LoFTR": Model(lambda: kornia.feature.LoFTR(pretrained=None)),
        "DISK": Model(lambda: kornia.feature.DISK()),
        "HardNet": Model(lambda: kornia.feature.HardNet(pretrained=False), lambda m: m(image(32, 1))),
        "SOSNet": Model(lambda: kornia.feature.SOSNet(pretrained=False), lambda m: m(image(32, 1))),
        "OriNet": Model(lambda: kornia.feature.OriNet(pretrained=False)),
        "AffNet": Model(lambda: kornia.feature.LAFAffNetShapeEstimator(pretrained=False)),
        "KeyNet": Model(lambda: kornia.feature.KeyNet(pretrained=False)),
        "MKDDescriptor": Model(lambda: kornia.feature.MKDDescriptor(whitening=None), lambda m: m(image(32, 1))),
        "SIFTDescriptor": Model(lambda: kornia.feature.SIFTDescriptor(), lambda m: m(image(41, 1))),
        "GaussianBlur2d": Model(lambda: kornia.filters.GaussianBlur2d((3, 3), (1.0, 1.0)), lambda m: m(image(16))),
        "Sobel": Model(lambda: kornia.filters.Sobel(), lambda m: m(image(16))),
        "SSIM": Model(lambda: kornia.losses.SSIMLoss(5), lambda m: m(image(16), image(16))),
        "augmentations": Model(
            lambda: kornia.augmentation.AugmentationSequential(
                kornia.augmentation.RandomAffine(15.0), kornia.augmentation.ColorJitter(0.1, 0.1)
            )
        ),
    }
