"""The architectures of ``zoo_steps``: small random models of families that the pruning zoo has none of.

Token mixers, split attention, pooling and linear attention (timm); state-space models, experts, encoder-decoders, two
towers, masked images, detection and segmentation transformers, speech, codecs, time series (transformers); recurrent
layers. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zoo_capture import Row, images
from zoo_models import SMALL as USUAL
from zoo_models import sounds, tokens

Inputs = tuple[Any, ...]


class Called(nn.Module):
    """A model called by keyword, that gives some of its outputs alone."""

    def __init__(self, model: nn.Module, names: Sequence[str], fields: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names, self.fields = model, tuple(names), tuple(fields)

    def forward(self, first: Tensor, second: Tensor | None = None, third: Tensor | None = None,
                fourth: Tensor | None = None) -> tuple[Tensor, ...]:
        given = [v for v in (first, second, third, fourth) if v is not None]
        found = self.model(**dict(zip(self.names, given, strict=True)))
        return tuple(getattr(found, field) for field in self.fields)


class Recurrent(nn.Module):
    """Words, two recurrent layers, a class for each word."""

    def __init__(self, layer: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 48)
        self.layer = layer(48, 64, 2, batch_first=True, **options)
        self.head = nn.Linear(64 * (1 + options.get("bidirectional", False)), 20)

    def forward(self, words: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(self.words(words))[0])
        return result


# ---- inputs
def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words(batch: int, size: int, seed: int) -> Inputs:
    return (torch.randint(5, 300, (batch, size), generator=seeded(seed)),)


def two_texts(batch: int, size: int, seed: int) -> Inputs:
    ids, mask = tokens(batch, size, seed)
    return ids, mask, torch.randint(5, 300, (batch, size // 2), generator=seeded(seed + 1))


def text_and_image(batch: int, size: int, seed: int) -> Inputs:
    return (*tokens(batch, 12, seed), torch.rand(batch, 3, size, size, generator=seeded(seed)))


def waves(batch: int, size: int, seed: int) -> Inputs:
    return (torch.randn(batch, 1, size, generator=seeded(seed)),)


def spectrogram(batch: int, size: int, seed: int) -> Inputs:
    return (torch.randn(batch, size, 32, generator=seeded(seed)),)


def series(batch: int, size: int, seed: int) -> Inputs:
    return (torch.randn(batch, size, 4, generator=seeded(seed)),)


def masked_image(batch: int, size: int, seed: int) -> Inputs:
    """An image, and the noise that says which of its patches are hidden."""
    noise = torch.rand(batch, (size // 16) ** 2, generator=seeded(seed + 1))
    return torch.rand(batch, 3, size, size, generator=seeded(seed)), noise


# ---- makers
#: name -> (pixels on a side, further options of ``create_model``, blocks that are kept of every stage; 0: all)
SIXTY_FOUR = {"img_size": 64}
TIMM: dict[str, tuple[int, dict[str, Any], int]] = {
    "mixer_s32_224": (64, SIXTY_FOUR, 2), "resmlp_12_224": (64, SIXTY_FOUR, 2), "gmlp_ti16_224": (64, SIXTY_FOUR, 2),
    "poolformer_s12": (64, {}, 1), "resnest14d": (64, {}, 0), "skresnet18": (64, {}, 0),
    "xcit_nano_12_p16_224": (64, {**SIXTY_FOUR, "depth": 2}, 0), "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}, 0),
    "twins_svt_small": (64, {**SIXTY_FOUR, "embed_dims": [32, 64, 96, 128], "depths": [2, 2, 2, 2]}, 0),
    "visformer_tiny": (64, {**SIXTY_FOUR, "depth": (2, 1, 1)}, 0), "levit_128s": (224, {"depth": (1, 1, 1)}, 0),
    "convmixer_768_32": (64, {}, 2), "convit_tiny": (64, SIXTY_FOUR, 2), "cait_xxs24_224": (64, SIXTY_FOUR, 2),
    "mobilevit_xxs": (64, {}, 0), "repvit_m0_9": (64, {}, 2), "ghostnet_050": (64, {}, 0),
    "fastvit_t8": (64, {"layers": (1, 1, 1, 1)}, 0), "starnet_s1": (64, {"depths": [1, 1, 2, 1]}, 0),
    "mambaout_femto": (64, {"depths": (1, 1, 1, 1)}, 0), "inception_next_atto": (64, {"depths": (1, 1, 1, 1)}, 0),
    "efficientvit_b0": (64, {}, 2), "bat_resnext26ts": (256, {}, 0), "halonet26t": (256, {}, 0),
    "lambda_resnet26t": (64, {}, 0), "pit_ti_224": (224, {}, 2), "tiny_vit_5m_224": (224, {}, 1),
    "sequencer2d_s": (64, SIXTY_FOUR, 1), "repvgg_a0": (64, {}, 0), "hrnet_w18_small": (64, {}, 0),
    "selecsls42": (64, {}, 0),
}
SMALL = {**USUAL, "num_hidden_layers": 2}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "use_cache": False,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**SMALL, "vocab_size": 300, "pad_token_id": 0, "max_position_embeddings": 66}
PATCHES = {**SMALL, "image_size": 64}
SPEECH = {**SMALL, "conv_dim": (64, 64, 64), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4), "vocab_size": 40,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3}
EXPERTS = {**DECODER, "moe_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "shared_expert_intermediate_size": 64}
SEQUENCES = {"d_model": 96, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "use_cache": False}
TEXT, IMAGE, PAIR = ("input_ids", "attention_mask"), ("pixel_values",), ("input_ids", "attention_mask", "pixel_values")
LOGITS = ("logits",)
TOWER = {**SMALL, "vocab_size": 300, "max_position_embeddings": 64}
BACKBONE = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}
DETECTION = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 10}

#: name -> (class, class of its configuration, options, how it is called, what it gives, inputs, size)
HUGGING: dict[str, tuple[str, str, dict[str, Any], Sequence[str], Sequence[str], Any, int]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": 300, "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4,
        "use_cache": False}, (*TEXT, "decoder_input_ids"), LOGITS, two_texts, 16),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**SEQUENCES, "vocab_size": 300,
             "max_position_embeddings": 64}, (*TEXT, "decoder_input_ids"), LOGITS, two_texts, 16),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 300, "n_positions": 64, "n_embd": 96, "n_layer": 3,
             "n_head": 4, "use_cache": False}, TEXT, LOGITS, tokens, 16),
    "opt": ("OPTForCausalLM", "OPTConfig", {"vocab_size": 300, "hidden_size": 96, "ffn_dim": 192,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 96,
            "use_cache": False}, TEXT, LOGITS, tokens, 16),
    "gptneox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "vocab_size": 300, "max_position_embeddings": 64,
                "use_cache": False}, TEXT, LOGITS, tokens, 16),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 24}, TEXT, LOGITS, tokens, 16),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": 300, "hidden_size": 64, "state_size": 8,
              "num_hidden_layers": 2, "use_cache": False, "use_mambapy": True}, TEXT[:1], LOGITS, words, 6),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {"vocab_size": 300, "hidden_size": 64, "state_size": 16,
               "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8, "num_hidden_layers": 2,
               "use_cache": False}, TEXT[:1], LOGITS, words, 12),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"vocab_size": 300, "hidden_size": 64, "attention_hidden_size": 64,
             "num_hidden_layers": 2, "context_length": 32, "use_cache": False}, TEXT[:1], LOGITS, words, 8),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS, TEXT, LOGITS, tokens, 16),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", EXPERTS, TEXT, LOGITS, tokens, 16),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**ENCODER, "embedding_size": 48}, TEXT, LOGITS,
                tokens, 16),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER, TEXT, LOGITS, tokens, 16),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**ENCODER, "embedding_size": 48}, TEXT, LOGITS,
               tokens, 16),
    "deberta_v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, TEXT, LOGITS, tokens, 16),
    "convbert": ("ConvBertForSequenceClassification", "ConvBertConfig", {**ENCODER, "embedding_size": 48}, TEXT, LOGITS,
                 tokens, 16),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", {
        **ENCODER, "attn_implementation": "eager", "reference_compile": False, "local_attention": 8}, TEXT, LOGITS,
        tokens, 16),
    "fnet": ("FNetForSequenceClassification", "FNetConfig", {**ENCODER, "num_attention_heads": 4}, TEXT[:1], LOGITS,
             words, 16),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TOWER, "vision_config": {**PATCHES, "patch_size": 16},
             "projection_dim": 64}, PAIR, ("logits_per_image",), text_and_image, 64),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": TOWER, "vision_config": {**PATCHES, "patch_size": 16}},
               PAIR, ("logits_per_image",), text_and_image, 64),
    "vit_mae": ("ViTMAEForPreTraining", "ViTMAEConfig", {
        **PATCHES, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 128}, ("pixel_values", "noise"), LOGITS, masked_image, 64),
    "beit": ("BeitForImageClassification", "BeitConfig", {**PATCHES, "use_relative_position_bias": True}, IMAGE, LOGITS,
             images, 64),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**PATCHES, "patch_size": 16}, IMAGE, LOGITS, images,
               64),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 64}, IMAGE, LOGITS, images,
        64),
    "yolos": ("YolosForObjectDetection", "YolosConfig", {**SMALL, "image_size": [64, 64], "num_detection_tokens": 10},
              IMAGE, ("logits", "pred_boxes"), images, 64),
    "detr": ("DetrForObjectDetection", "DetrConfig", {
        **DETECTION, "backbone_config": {**BACKBONE, "out_features": ["stage4"]}}, IMAGE,
        ("logits", "pred_boxes"), images, 64),
    "deformable_detr": ("DeformableDetrForObjectDetection", "DeformableDetrConfig", {
        **DETECTION, "backbone_config": {**BACKBONE, "out_features": ["stage3", "stage4"]}, "num_feature_levels": 2,
        "disable_custom_kernels": True}, IMAGE, ("logits", "pred_boxes"), images, 64),
    "swin2sr": ("Swin2SRForImageSuperResolution", "Swin2SRConfig", {
        "image_size": 32, "embed_dim": 48, "depths": [2, 2], "num_heads": [4, 4], "window_size": 4}, IMAGE,
        ("reconstruction",), images, 32),
    "hubert": ("HubertForSequenceClassification", "HubertConfig", SPEECH, ("input_values",), LOGITS, sounds, 4000),
    "wavlm": ("WavLMForSequenceClassification", "WavLMConfig", SPEECH, ("input_values",), LOGITS, sounds, 4000),
    "wav2vec2_conformer": ("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", SPEECH, ("input_values",), LOGITS,
                           sounds, 4000),
    "ast": ("ASTForAudioClassification", "ASTConfig", {**SMALL, "max_length": 64, "num_mel_bins": 32,
            "patch_size": 16, "frequency_stride": 16, "time_stride": 16}, ("input_values",), LOGITS, spectrogram, 64),
    "encodec": ("EncodecModel", "EncodecConfig", {"num_filters": 8, "hidden_size": 32, "codebook_size": 64,
                "codebook_dim": 32, "upsampling_ratios": [4, 2], "target_bandwidths": [36.0]}, ("input_values",),
                ("audio_values",), waves, 960),
    "dac": ("DacModel", "DacConfig", {"encoder_hidden_size": 16, "decoder_hidden_size": 64, "hidden_size": 64,
            "downsampling_ratios": [2, 4], "upsampling_ratios": [4, 2], "n_codebooks": 2, "codebook_size": 64,
            "codebook_dim": 8}, ("input_values",), ("audio_values",), waves, 640),
    "patchtst": ("PatchTSTForPrediction", "PatchTSTConfig", {
        "num_input_channels": 4, "context_length": 64, "patch_length": 8, "patch_stride": 8, "prediction_length": 16,
        "d_model": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}, ("past_values",),
        ("prediction_outputs",), series, 64),
    "patchtsmixer": ("PatchTSMixerForPrediction", "PatchTSMixerConfig", {
        "num_input_channels": 4, "context_length": 64, "patch_length": 8, "patch_stride": 8, "prediction_length": 16,
        "d_model": 48, "num_layers": 2}, ("past_values",), ("prediction_outputs",), series, 64),
}


def _timm(name: str) -> Row:
    size, options, blocks = TIMM[name]

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return shortened(model, blocks) if blocks else model

    return Row(make, images, size)


def shortened(model: nn.Module, most: int) -> nn.Module:
    """The model with the first ``most`` blocks of every stage."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if name in ("blocks", "layers") and isinstance(child, (nn.Sequential, nn.ModuleList)):
                setattr(module, name, child[:most])
    return model


def _hugging(name: str) -> Row:
    cls, config, options, called, fields, inputs, size = HUGGING[name]

    def make() -> nn.Module:
        import transformers

        built = getattr(transformers, config)(**options)
        return Called(getattr(transformers, cls)(built), called, fields)

    return Row(make, inputs, size)


RECURRENT = {
    "nn_lstm": Row(lambda: Recurrent(nn.LSTM), words, 12),
    "nn_gru": Row(lambda: Recurrent(nn.GRU, bidirectional=True), words, 12),
    "nn_rnn": Row(lambda: Recurrent(nn.RNN), words, 12),
}
ROWS: dict[str, Row] = {f"hf_{n}": _hugging(n) for n in HUGGING} | {f"timm_{n}": _timm(n) for n in TIMM} | RECURRENT
