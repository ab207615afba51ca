"""The models of the pruning zoo: all 109 of torchvision 0.29, one per awkward family of timm, and small transformers.

Every entry is a ``Row`` of ``zoo_capture``: how the model is made (random weights, nothing downloaded) and fed. Images
are as small as the architecture permits, so that the whole zoo runs on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from zoo_capture import Row, _named, clips, images, pairs, photographs

DETECTORS = ("rcnn", "retinanet", "fcos", "ssd")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit", "swin3d")
#: pixels on a side, where the architecture does not take 64
SIZES = {"inception_v3": 96, "maxvit_t": 224, "raft_large": 128, "raft_small": 128, "s3d": 224, "mvit_v1_b": 224,
         "mvit_v2_s": 224, "vit_h_14": 56, "deeplabv3_mobilenet_v3_large": 128, "lraspp_mobilenet_v3_large": 128}
SIZES |= {f"swin_{k}": 112 for k in "tsb"} | {f"swin_v2_{k}": 128 for k in "tsb"}
FRAMES = {"s3d": 16, "mvit_v1_b": 16, "mvit_v2_s": 16}


def few_clips(frames: int) -> Callable[[int, int, int], tuple[Any, ...]]:
    return lambda batch, size, seed: (clips(batch, size, seed)[0][:, :, :frames],)


def _torchvision(name: str) -> Row:
    if any(k in name for k in DETECTORS):
        return Row(_named(name), photographs, 128, parts=True)
    size = SIZES.get(name, 64)
    if name.startswith("vit_"):
        return Row(lambda: torchvision.models.get_model(name, weights=None, image_size=size), images, size)
    if name.startswith(VIDEO):
        return Row(_named(name), few_clips(FRAMES.get(name, 8)), size)
    return Row(_named(name), pairs if name.startswith("raft") else images, size)


# ---- timm
#: name -> (pixels on a side, further options of ``create_model``)
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "deit_tiny_patch16_224": (64, {"img_size": 64}), "deit3_small_patch16_224": (64, {"img_size": 64}),
    "cspresnet50": (64, {}), "cspdarknet53": (64, {}), "nfnet_l0": (64, {}), "eca_nfnet_l0": (64, {}),
    "dpn68b": (64, {}), "res2net50_14w_8s": (64, {}), "coat_tiny": (64, {"img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}), "crossvit_tiny_240": (240, {}), "davit_tiny": (64, {}),
    "edgenext_xx_small": (64, {}), "efficientformer_l1": (224, {}), "efficientformerv2_s0": (224, {}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "num_classes": 10}),
    "focalnet_tiny_srf": (64, {}), "caformer_s18": (64, {}),
    "swin_tiny_patch4_window7_224": (112, {"img_size": 112}), "swinv2_tiny_window8_256": (128, {"img_size": 128}),
    "mvitv2_tiny": (64, {"img_size": 64}),
}


def _timm(name: str) -> Row:
    size, options = TIMM[name]

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    return Row(make, images, size)


# ---- transformers: small random configurations
SMALL: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}


def tokens(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    """Token numbers and an attention mask that hides the end of the first sentence."""
    ids = torch.randint(5, 300, (batch, size), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return ids, mask


def spectra(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    return (torch.randn(batch, 40, size, generator=torch.Generator().manual_seed(seed)),)


def sounds(batch: int, size: int, seed: int) -> tuple[Any, ...]:
    return (torch.randn(batch, size, generator=torch.Generator().manual_seed(seed)),)


def _language(which: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as t

        decoder = {**SMALL, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
                   "use_cache": False}
        models: dict[str, Callable[[], Any]] = {
            "bert": lambda: t.BertForSequenceClassification(t.BertConfig(vocab_size=300, **SMALL)),
            "distilbert": lambda: t.DistilBertForSequenceClassification(
                t.DistilBertConfig(vocab_size=300, dim=96, n_layers=3, n_heads=4, hidden_dim=256)),
            "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)),
            "llama_tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(tie_word_embeddings=True, **decoder)),
            "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**decoder)),
        }
        model: nn.Module = models[which]()
        return model

    return make


class Boxes(nn.Module):
    """A detector's class and box outputs alone: the hidden states that it returns beside would keep their width."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(image)
        return found.logits, found.pred_boxes


def _vision(which: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as t

        backbone = t.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1],
                                  out_features=["stage4"])
        models: dict[str, Callable[[], Any]] = {
            "vit": lambda: t.ViTForImageClassification(t.ViTConfig(image_size=64, **SMALL)),
            "swin": lambda: t.SwinForImageClassification(t.SwinConfig(
                image_size=64, embed_dim=48, depths=[2, 2], num_heads=[2, 4], window_size=4)),
            "detr": lambda: Boxes(t.DetrForObjectDetection(t.DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
                d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                encoder_ffn_dim=256, decoder_ffn_dim=256, num_queries=10))),
        }
        model: nn.Module = models[which]()
        return model

    return make


def _sound(which: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as t

        models: dict[str, Callable[[], Any]] = {
            "whisper": lambda: t.WhisperForAudioClassification(t.WhisperConfig(
                d_model=96, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=256, num_mel_bins=40,
                max_source_positions=50)),
            "wav2vec2": lambda: t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(
                conv_dim=(64, 64, 64), conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4), num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4, **SMALL)),
        }
        model: nn.Module = models[which]()
        return model

    return make


TRANSFORMERS: dict[str, Row] = {
    **{f"hf_{n}": Row(_language(n), tokens, 16) for n in ("bert", "distilbert", "llama", "llama_tied", "qwen2")},
    **{f"hf_{n}": Row(_vision(n), images, 64) for n in ("vit", "swin", "detr")},
    "hf_whisper": Row(_sound("whisper"), spectra, 100), "hf_wav2vec2": Row(_sound("wav2vec2"), sounds, 4000),
}
TORCHVISION: dict[str, Row] = {
    n: _torchvision(n) for n in torchvision.models.list_models() if not n.startswith("quantized_")}
ROWS: dict[str, Row] = TORCHVISION | {f"timm_{n}": _timm(n) for n in TIMM} | TRANSFORMERS
