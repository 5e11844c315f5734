"""Tiny models of many architectures of transformers, by name: hidden size 64, two layers, each with an input."""

import torch
import transformers as T

# fmt: off
IDS = torch.tensor([[5, 9, 3, 17, 8, 4, 11, 6], [7, 12, 13, 3, 4, 19, 21, 6]])
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
TEXT = dict(**SMALL, vocab_size=128, max_position_embeddings=64)
TOKENS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
DECODER = dict(**TEXT, **TOKENS)
GROUPED = dict(**DECODER, num_key_value_heads=2)
VISION = dict(**SMALL, image_size=32, patch_size=8)
EXPERTS = dict(moe_intermediate_size=32, num_experts_per_tok=2)
MAMBA = dict(hidden_size=64, num_hidden_layers=2, vocab_size=128, **TOKENS)
DEEPSEEK = dict(
    **GROUPED, **EXPERTS, n_routed_experts=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, head_dim=16, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1,
)
SEQ2SEQ = dict(
    vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64,
    decoder_start_token_id=2, forced_eos_token_id=2,
    **TOKENS,
)
T5 = dict(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
AUDIO = dict(
    **SMALL, vocab_size=32, conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(5, 4), num_feat_extract_layers=2,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
)
BACKBONE = dict(
    embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
    out_features=["stage1", "stage2", "stage3", "stage4"],
)

ids = lambda: dict(input_ids=IDS)  # noqa: E731
image = lambda size=32: dict(pixel_values=torch.randn(1, 3, size, size))  # noqa: E731
pair = lambda: dict(input_ids=IDS, decoder_input_ids=IDS)  # noqa: E731
sound = lambda: dict(input_values=torch.randn(1, 4000))  # noqa: E731


def detr():
    return T.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=T.ResNetConfig(**BACKBONE), num_queries=5,
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )


def sam():
    vision = dict(**VISION, output_channels=16, mlp_dim=32, global_attn_indexes=[0], window_size=4, num_pos_feats=8)
    return T.SamConfig(
        vision_config={**vision, "image_size": 64},
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16),
    )


def llava():
    text = T.LlamaConfig(**GROUPED)
    return T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION), text_config=text, image_token_index=127, vision_feature_layer=-1
    )


def qwen2_vl():
    text = dict(**GROUPED, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0})
    vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=8, mlp_ratio=2)
    return T.Qwen2VLConfig(text_config=text, vision_config=vision)


# By name: the class of the model, its configuration, and a function that makes its input.
ARCHITECTURES = {
    "llama": (T.LlamaForCausalLM, lambda: T.LlamaConfig(**GROUPED), ids),
    "mistral": (T.MistralForCausalLM, lambda: T.MistralConfig(**GROUPED), ids),
    "qwen2": (T.Qwen2ForCausalLM, lambda: T.Qwen2Config(**GROUPED), ids),
    "qwen3": (T.Qwen3ForCausalLM, lambda: T.Qwen3Config(**GROUPED, head_dim=16), ids),
    "gemma2": (T.Gemma2ForCausalLM, lambda: T.Gemma2Config(**GROUPED, head_dim=16), ids),
    "gemma3": (T.Gemma3ForCausalLM, lambda: T.Gemma3TextConfig(**GROUPED, head_dim=16), ids),
    "phi3": (T.Phi3ForCausalLM, lambda: T.Phi3Config(**GROUPED), ids),
    "gpt2": (
        T.GPT2LMHeadModel,
        lambda: T.GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=128, **TOKENS),
        ids,
    ),
    "gpt_neox": (T.GPTNeoXForCausalLM, lambda: T.GPTNeoXConfig(**DECODER), ids),
    "opt": (
        T.OPTForCausalLM,
        lambda: T.OPTConfig(**DECODER, ffn_dim=96, word_embed_proj_dim=64),
        ids,
    ),
    "bloom": (
        T.BloomForCausalLM,
        lambda: T.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, **TOKENS),
        ids,
    ),
    "falcon": (T.FalconForCausalLM, lambda: T.FalconConfig(**DECODER), ids),
    "mpt": (
        T.MptForCausalLM,
        lambda: T.MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=128, max_seq_len=64),
        ids,
    ),
    "deepseek_v3": (T.DeepseekV3ForCausalLM, lambda: T.DeepseekV3Config(**{**DEEPSEEK, "num_key_value_heads": 4}), ids),
    "deepseek_v2": (T.DeepseekV2ForCausalLM, lambda: T.DeepseekV2Config(**{**DEEPSEEK, "num_key_value_heads": 4}), ids),
    "mixtral": (T.MixtralForCausalLM, lambda: T.MixtralConfig(**GROUPED, num_local_experts=4), ids),
    "qwen3_moe": (
        T.Qwen3MoeForCausalLM,
        lambda: T.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4, head_dim=16),
        ids,
    ),
    "qwen2_moe": (
        T.Qwen2MoeForCausalLM,
        lambda: T.Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
        ids,
    ),
    "olmoe": (T.OlmoeForCausalLM, lambda: T.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2), ids),
    "glm4_moe": (
        T.Glm4MoeForCausalLM,
        lambda: T.Glm4MoeConfig(
            **GROUPED, **EXPERTS, n_routed_experts=4, head_dim=16, first_k_dense_replace=1, n_group=1, topk_group=1
        ),
        ids,
    ),
    "ernie4_5_moe": (
        T.Ernie4_5_MoeForCausalLM,
        lambda: T.Ernie4_5_MoeConfig(
            **GROUPED,
            moe_intermediate_size=32,
            moe_num_experts=4,
            moe_k=2,
            moe_layer_start_index=1,
            moe_num_shared_experts=1,
        ),
        ids,
    ),
    "aria_text": (
        T.AriaTextForCausalLM,
        lambda: T.AriaTextConfig(**GROUPED, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        ids,
    ),
    "nemotron_h": (
        T.NemotronHForCausalLM,
        lambda: T.NemotronHConfig(
            **{key: value for key, value in GROUPED.items() if key != "num_hidden_layers"},
            **EXPERTS,
            layers_block_type=["attention", "moe"],
            n_routed_experts=4,
            moe_shared_expert_intermediate_size=32,
            head_dim=16,
            n_group=1,
            topk_group=1,
        ),
        ids,
    ),
    "dbrx": (
        T.DbrxForCausalLM,
        lambda: T.DbrxConfig(
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=128,
            ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
            attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
            **TOKENS,
        ),
        ids,
    ),
    "jetmoe": (
        T.JetMoeForCausalLM,
        lambda: T.JetMoeConfig(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=16,
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            **TOKENS,
        ),
        ids,
    ),
    "gpt_oss": (T.GptOssForCausalLM, lambda: T.GptOssConfig(**GROUPED, num_local_experts=4, head_dim=16), ids),
    "granite": (T.GraniteForCausalLM, lambda: T.GraniteConfig(**GROUPED), ids),
    "granitemoe": (T.GraniteMoeForCausalLM, lambda: T.GraniteMoeConfig(**GROUPED, num_local_experts=4), ids),
    "olmo2": (T.Olmo2ForCausalLM, lambda: T.Olmo2Config(**GROUPED), ids),
    "cohere": (T.CohereForCausalLM, lambda: T.CohereConfig(**GROUPED), ids),
    "mamba": (T.MambaForCausalLM, lambda: T.MambaConfig(**MAMBA, state_size=4, time_step_rank=4), ids),
    "falcon_mamba": (
        T.FalconMambaForCausalLM,
        lambda: T.FalconMambaConfig(**MAMBA, state_size=4, time_step_rank=4),
        ids,
    ),
    "mamba2": (
        T.Mamba2ForCausalLM,
        lambda: T.Mamba2Config(**MAMBA, state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=4),
        ids,
    ),
    "jamba": (
        T.JambaForCausalLM,
        lambda: T.JambaConfig(
            **GROUPED,
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        ids,
    ),
    "llama4_text": (
        T.Llama4ForCausalLM,
        lambda: T.Llama4TextConfig(**GROUPED, num_local_experts=2, intermediate_size_mlp=96, head_dim=16),
        ids,
    ),
    "longcat": (
        T.LongcatFlashForCausalLM,
        lambda: T.LongcatFlashConfig(
            vocab_size=128,
            hidden_size=64,
            num_layers=1,
            num_attention_heads=4,
            ffn_hidden_size=96,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
            head_dim=16,
            moe_topk=2,
            n_routed_experts=4,
            zero_expert_num=2,
            expert_ffn_hidden_size=32,
        ),
        ids,
    ),
    "bert": (T.BertForMaskedLM, lambda: T.BertConfig(**TEXT), ids),
    "bert_cls": (T.BertForSequenceClassification, lambda: T.BertConfig(**TEXT), ids),
    "roberta": (T.RobertaForMaskedLM, lambda: T.RobertaConfig(**TEXT, **TOKENS), ids),
    "deberta_v2": (
        T.DebertaV2ForMaskedLM,
        lambda: T.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
        ids,
    ),
    "modernbert": (T.ModernBertForMaskedLM, lambda: T.ModernBertConfig(**TEXT, **TOKENS, cls_token_id=1), ids),
    "distilbert": (
        T.DistilBertForMaskedLM,
        lambda: T.DistilBertConfig(vocab_size=128, dim=64, n_layers=2, n_heads=4, hidden_dim=96),
        ids,
    ),
    "electra": (T.ElectraForMaskedLM, lambda: T.ElectraConfig(**TEXT, embedding_size=32), ids),
    "mobilebert": (
        T.MobileBertForMaskedLM,
        lambda: T.MobileBertConfig(**TEXT, embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
        ids,
    ),
    "layoutlmv3": (
        T.LayoutLMv3Model,
        lambda: T.LayoutLMv3Config(
            **TEXT,
            coordinate_size=10,
            shape_size=12,
            input_size=32,
            patch_size=8,
            has_relative_attention_bias=True,
            has_spatial_attention_bias=True,
        ),
        lambda: dict(input_ids=IDS[:1], bbox=torch.zeros(1, 8, 4, dtype=torch.long), **image()),
    ),
    "t5": (T.T5ForConditionalGeneration, lambda: T.T5Config(**T5), pair),
    "flan_t5": (
        T.T5ForConditionalGeneration,
        lambda: T.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        pair,
    ),
    "longt5": (T.LongT5ForConditionalGeneration, lambda: T.LongT5Config(**T5, local_radius=3), pair),
    "bart": (T.BartForConditionalGeneration, lambda: T.BartConfig(**SEQ2SEQ), pair),
    "marian": (T.MarianMTModel, lambda: T.MarianConfig(**SEQ2SEQ), pair),
    "whisper": (
        T.WhisperForConditionalGeneration,
        lambda: T.WhisperConfig(**SEQ2SEQ, num_mel_bins=16, max_source_positions=32, max_target_positions=64),
        lambda: dict(input_features=torch.randn(2, 16, 64), decoder_input_ids=IDS),
    ),
    "vit": (T.ViTForImageClassification, lambda: T.ViTConfig(**VISION), image),
    "dinov2": (T.Dinov2ForImageClassification, lambda: T.Dinov2Config(**VISION, mlp_ratio=2), image),
    "swin": (
        T.SwinForImageClassification,
        lambda: T.SwinConfig(image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4),
        image,
    ),
    "clip": (
        T.CLIPModel,
        lambda: T.CLIPConfig(text_config=dict(**TEXT, **TOKENS), vision_config=VISION),
        lambda: dict(**ids(), **image()),
    ),
    "siglip": (
        T.SiglipModel,
        lambda: T.SiglipConfig(text_config=dict(**TEXT, **TOKENS, projection_size=64), vision_config=VISION),
        lambda: dict(**ids(), **image()),
    ),
    "sam": (
        T.SamModel,
        sam,
        lambda: dict(**image(64), input_points=torch.tensor([[[[10.0, 10.0]]]])),
    ),
    "resnet": (T.ResNetForImageClassification, lambda: T.ResNetConfig(**BACKBONE), image),
    "convnext": (
        T.ConvNextForImageClassification,
        lambda: T.ConvNextConfig(hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], image_size=32, patch_size=2),
        image,
    ),
    "detr": (T.DetrForSegmentation, detr, lambda: image(64)),
    "llava": (T.LlavaForConditionalGeneration, llava, ids),
    "qwen2_vl": (T.Qwen2VLForConditionalGeneration, qwen2_vl, ids),
    "wav2vec2": (T.Wav2Vec2ForCTC, lambda: T.Wav2Vec2Config(**AUDIO), sound),
    "wav2vec2_xvector": (
        T.Wav2Vec2ForXVector,
        lambda: T.Wav2Vec2Config(
            **AUDIO, tdnn_dim=(16, 16, 16), tdnn_kernel=(3, 3, 1), tdnn_dilation=(1, 2, 1), xvector_output_dim=16
        ),
        sound,
    ),
    "wavlm": (T.WavLMModel, lambda: T.WavLMConfig(**AUDIO, num_buckets=16, max_bucket_distance=32), sound),
}
