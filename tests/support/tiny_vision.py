"""Tiny random multimodal checkpoints by transformers, one of each model_type whose text decoder jaxft has."""

import torch

TEXT = dict(
    vocab_size=321, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VIT = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
    patch_size=14,
)  # fmt: skip
CLIP = dict(VIT, model_type="clip_vision_model", projection_dim=32)
SIGLIP = dict(VIT, model_type="siglip_vision_model")
PIXTRAL = dict(VIT, model_type="pixtral", head_dim=16)
TILES = dict(VIT, image_size=[28, 28], patch_size=[14, 14])
QWEN_VIT = dict(
    depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, fullatt_block_indexes=[0]
)
PERCEIVER = dict(
    hidden_size=64, resampler_n_latents=2, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8,
    num_key_value_heads=1,
)  # fmt: skip
SAM = dict(
    hidden_size=32, output_channels=32, num_hidden_layers=1, num_attention_heads=2, image_size=64,
    patch_size=16, mlp_dim=32, global_attn_indexes=[0], window_size=2,
)  # fmt: skip
VIDEO = dict(image_token_id=10, video_token_id=11)
QWEN = dict(VIDEO, vision_start_token_id=12, vision_end_token_id=13)
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def case(text, vision, **others):
    """(settings of the text decoder: its model_type or a dict, of the vision tower, others)."""
    text = {"model_type": text} if isinstance(text, str) else text
    return {"text_config": TEXT | text, "vision_config": vision, **others}


MISTRAL = {"model_type": "mistral", "sliding_window": None}
GEMMA3 = dict(
    model_type="gemma3_text", num_hidden_layers=3, sliding_window=7, query_pre_attn_scalar=16,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_scaling={"rope_type": "linear", "factor": 8.0},
)  # fmt: skip
PHI3 = {name: value for name, value in TEXT.items() if name != "head_dim"} | {"model_type": "phi3"}
CASES = {
    "gemma3": case(GEMMA3, SIGLIP, mm_tokens_per_image=4),
    "mistral3": case(MISTRAL, PIXTRAL, image_token_index=10),
    "llava": case("llama", CLIP, image_token_index=10),
    "llava with a pixtral": case(MISTRAL, PIXTRAL, image_token_index=10),
    "llava with a phi3": {"text_config": PHI3, "vision_config": CLIP, "image_token_index": 10},
    "llava_next": case(MISTRAL, CLIP, image_token_index=10, image_grid_pinpoints=[[28, 28]]),
    "llava_next_video": case("llama", CLIP, image_token_index=10, video_token_index=11),
    "llava_onevision": case("qwen2", SIGLIP, image_token_index=10, video_token_index=11),
    "vipllava": case("llama", CLIP, image_token_index=10, vision_feature_layers=[-1]),
    "video_llava": case("llama", CLIP, image_token_index=10, video_token_index=11),
    "idefics2": case(MISTRAL, VIT, perceiver_config=PERCEIVER, image_token_id=10),
    "idefics3": case("llama", VIT, image_token_id=10, scale_factor=2, pad_token_id=0),
    "smolvlm": case("llama", VIT, image_token_id=10, scale_factor=2, pad_token_id=0),
    "internvl": case("qwen2", TILES, image_token_id=10),
    "ovis2": case(
        "qwen2", dict(VIT, vocab_size=20, num_visual_indicator_tokens=5), image_token_id=10,
        visual_indicator_token_ids=[11, 12, 13, 14, 15],
    ),
    "got_ocr2": case("qwen2", SAM, image_token_index=10),
    "lighton_ocr": case("qwen3", PIXTRAL, image_token_id=10),
    "deepseek_vl": case("llama", SIGLIP, image_token_id=10),
    "janus": case("llama", dict(VIT, projection_dim=64, mlp_ratio=1), image_token_id=10),
    "video_llama_3": case("qwen2", VIT, **VIDEO),
    "exaone4_5": case("exaone4", QWEN_VIT, **VIDEO),
    "qwen2_vl": case(
        {"model_type": "qwen2_vl_text", "rope_parameters": SECTIONS},
        dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=1), **QWEN,
    ),
    "qwen2_5_vl": case({"model_type": "qwen2_5_vl_text", "rope_parameters": SECTIONS}, QWEN_VIT, **QWEN),
    "qwen3_vl": case(
        {"model_type": "qwen3_vl_text", "rope_parameters": SECTIONS | {"mrope_interleaved": True}},
        dict(QWEN_VIT, deepstack_visual_indexes=[0], num_position_embeddings=16), **QWEN,
    ),
}  # fmt: skip


def write_tiny(kind, folder, **save):
    """Write the checkpoint of a case to a folder; return transformers' model. save: of save_pretrained."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind.partition(" ")[0]](**CASES[kind])
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()
    model.save_pretrained(folder, **save)
    return model
