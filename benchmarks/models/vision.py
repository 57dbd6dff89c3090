"""timm's image models."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.models.problem import Row, images

__all__ = ["ROWS"]


def _create(name: str, **size: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=3, **size)
    return model


def _row(title: str, name: str, pixels: int = 32, **size: Any) -> Row:
    return Row("timm", title, images(lambda: _create(name, **size), pixels))


def _resnet(block: str) -> nn.Module:
    from timm.models import resnet

    kind = getattr(resnet, block)
    return resnet.ResNet(kind, layers=(1, 1, 1, 1), channels=(4, 8, 8, 12), stem_width=4, num_classes=3)


def _convnext(**options: Any) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 12, 16), **options)


def _efficientnet() -> nn.Module:
    from timm.models import efficientnet

    return efficientnet._gen_efficientnet(
        "efficientnet_b0", channel_multiplier=0.1, depth_multiplier=0.1, num_classes=3
    )


def _mobilenet(kind: str) -> nn.Module:
    from timm.models import efficientnet, mobilenetv3

    if kind == "v2":
        return efficientnet._gen_mobilenet_v2("mobilenetv2_100", channel_multiplier=0.1, num_classes=3)
    return mobilenetv3._gen_mobilenet_v3("mobilenetv3_small_100", channel_multiplier=0.1, num_classes=3)


def _densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(1, 1, 1, 1), num_classes=3)


def _mixer(block: str, **options: Any) -> nn.Module:
    from timm.models import mlp_mixer

    kind = getattr(mlp_mixer, block)
    return mlp_mixer.MlpMixer(num_classes=3, img_size=32, patch_size=8, embed_dim=12, block_layer=kind, **options)


def _gmlp() -> nn.Module:
    from timm.models import mlp_mixer

    return _mixer("SpatialGatingBlock", num_blocks=2, mlp_ratio=4, mlp_layer=mlp_mixer.GatedMlp)


def _convmixer() -> nn.Module:
    from timm.models.convmixer import ConvMixer

    return ConvMixer(dim=8, depth=2, kernel_size=5, patch_size=4, num_classes=3)


def _poolformer() -> nn.Module:
    from timm.models.metaformer import MetaFormer

    return MetaFormer(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), num_classes=3)


def _transformer(patch: int = 8, **more: Any) -> dict[str, Any]:
    return {"img_size": 32, "patch_size": patch, "embed_dim": 12, "depth": 2, **more}


_SWIN: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "window_size": 4,
}

ROWS = [
    Row("timm", "ResNet (basic blocks)", images(lambda: _resnet("BasicBlock"))),
    Row("timm", "ResNet (bottlenecks)", images(lambda: _resnet("Bottleneck"))),
    Row("timm", "ConvNeXt", images(_convnext)),
    Row("timm", "ConvNeXt V2", images(lambda: _convnext(use_grn=True, ls_init_value=None))),
    _row("ViT", "vit_tiny_patch16_224", **_transformer(num_heads=3)),
    _row("ViT with layer scale", "vit_tiny_patch16_224", **_transformer(num_heads=3, init_values=0.1)),
    _row("DeiT III", "deit3_small_patch16_224", **_transformer(num_heads=3)),
    _row("BEiT", "beit_base_patch16_224", **_transformer(num_heads=3)),
    _row("EVA-02", "eva02_tiny_patch14_224", **_transformer(num_heads=3)),
    _row("CaiT", "cait_xxs24_224", **_transformer(num_heads=3)),
    _row("Swin", "swin_tiny_patch4_window7_224", **_SWIN),
    _row("Swin V2", "swinv2_tiny_window8_256", **_SWIN),
    Row("timm", "EfficientNet", images(_efficientnet)),
    Row("timm", "MobileNetV2", images(lambda: _mobilenet("v2"))),
    Row("timm", "MobileNetV3", images(lambda: _mobilenet("v3"))),
    Row("timm", "DenseNet", images(_densenet)),
    Row("timm", "MLP-Mixer", images(lambda: _mixer("MixerBlock", num_blocks=2))),
    Row("timm", "gMLP", images(_gmlp)),
    Row("timm", "ResMLP", images(lambda: _mixer("ResBlock", num_blocks=2, mlp_ratio=4))),
    Row("timm", "ConvMixer", images(_convmixer)),
    Row("timm", "PoolFormer", images(_poolformer)),
]
