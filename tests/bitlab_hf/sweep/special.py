"""What the general rules get wrong, as data: one line for each architecture."""

from __future__ import annotations

from typing import Any

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}  # noqa: E501
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_WINDOWS = {"image_size": 64, "window_size": 2}
_RESNET = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}}  # noqa: E501
_FOUR = {"backbone_config.num_hidden_layers": 4, "backbone_config.out_indices": [1, 2, 3, 4], "backbone_config.reshape_hidden_states": False}  # noqa: E501
# model_type -> fields of its configuration; a dot leads into a nested one.
FIELDS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64},
    "autoformer": {**_SERIES, "label_length": 4, "moving_average": 3},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "blip-2": {"image_token_index": 11},
    "blt": {"encoder_hash_byte_group_vocab": 50, "num_hidden_layers": 2},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_local_encoder": {"hidden_size_global": 64},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "chmv2": _FOUR,
    "clap_audio_model": {"spec_size": 64, "num_mel_bins": 64, "window_size": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},  # noqa: E501
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _RESNET,
    "depth_anything": _FOUR,
    "detr": _RESNET,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "donut-swin": _WINDOWS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}},  # noqa: E501
    "esm": {"vocab_size": 97, "pad_token_id": 1, "mask_token_id": 32},
    "exaone4_5_vision": {"window_size": 32},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "glm4v_moe_text": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},  # noqa: E501
    "glm4v_text": {"rope_parameters": _SECTIONS},
    "glm5_next_text": {"index_topk": 16},
    "glm_image_text": {"rope_parameters": _SECTIONS},
    "glm_ocr_text": {"rope_parameters": _SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [2, 2, 2, 2]}},  # noqa: E501
    "informer": _SERIES,
    "instructblip": {"image_token_index": 11},
    "instructblipvideo": {"video_token_index": 11},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},  # noqa: E501
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"], "num_hidden_layers": 3},  # noqa: E501
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "mistral4": {"qk_nope_head_dim": 8, "v_head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},  # noqa: E501
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "patchtsmixer": {"context_length": 32},
    "prompt_depth_anything": _FOUR,
    "qwen2_5_omni_text": {"rope_parameters": _SECTIONS},
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": {"rope_parameters": _SECTIONS},
    "qwen3_omni_moe_text": {"rope_parameters": _SECTIONS},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2},  # noqa: E501
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [3, 4], "axial_pos_embds_dim": [32, 32]},
    "sam_hq_vision_model": {"num_pos_feats": 32},
    "sam_vision_model": {"num_pos_feats": 32},
    "seggpt": {"image_size": [64, 32]},
    "step3p7": {"text_config.sliding_window": 8},
    "swin": _WINDOWS,
    "table-transformer": _RESNET,
    "time_series_transformer": _SERIES,
    "tipsv2_dpt": _FOUR,
    "wav2vec2-bert": {"vocab_size": 97},
    "wav2vec2-conformer": {"vocab_size": 97},
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]},  # noqa: E501
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "num_mem_blocks": 2},  # noqa: E501
    "zoedepth": _FOUR,
}
# model_type -> the class to build, where it is not the first of the automatic ones.
CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "splinter": "SplinterModel",
}
_TIME = {"past_values": (2, 11), "past_time_features": (2, 11, 1), "past_observed_mask": (2, 11), "future_values": (2, 4), "future_time_features": (2, 4, 1)}  # noqa: E501
_FRAMES_FIRST = {"input_features": (2, 128, 32)}
_PATCHES = {"pixel_values": (2, 16, 192), "pixel_attention_mask": (2, 16), "spatial_shapes": [[4, 4], [4, 4]]}  # noqa: E501
_TILES = {"pixel_values": (2, 1, 3, 32, 32)}
# model_type -> inputs of its forward: a shape of random values or tokens, a list of values, None
# for one that is not given.
INPUTS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"input_values": (2, 64, 32)},
    "audioflamingo3_encoder": {"input_features_mask": (2, 128)},
    "autoformer": _TIME,
    "blip_2_qformer": {"encoder_hidden_states": (2, 12, 64)},
    "bros": {"bbox": (2, 12, 8)},
    "canary": _FRAMES_FIRST,
    "clap": {"input_features": (2, 1, 64, 64)},
    "clvp": {"input_features": (2, 64, 32)},
    "cohere_asr": _FRAMES_FIRST,
    "colmodernvbert": _TILES,
    "cosmos3_edge_vision": {"pixel_values": (32, 192)},
    "dac": {"input_values": (2, 1, 640)},
    "decision_transformer": {"states": (2, 4, 17), "actions": (2, 4, 4), "rewards": (2, 4, 1), "returns_to_go": (2, 4, 1), "timesteps": [[0, 1, 2, 3]] * 2, "attention_mask": (2, 4)},  # noqa: E501
    "dia": {"decoder_input_ids": (2, 12, 9)},
    "encodec": {"input_values": (2, 1, 640)},
    "grounding-dino": {"pixel_values": (2, 3, 64, 64)},
    "idefics": {"pixel_values": (2, 1, 3, 32, 32), "image_attention_mask": (2, 12, 1)},
    "idefics2": _TILES,
    "idefics3": _TILES,
    "informer": _TIME,
    "instructblipvideo": {"pixel_values": (2, 4, 3, 32, 32)},
    "kimi_k25_vision": {"pixel_values": (32, 3, 8, 8)},
    "kosmos-2": {"image_embeds_position_mask": [[0, 1, 1, 1, 1] + [0] * 7] * 2},
    "lasr_ctc": _FRAMES_FIRST,
    "lasr_encoder": _FRAMES_FIRST,
    "lxmert": {"visual_feats": (2, 5, 2048), "visual_pos": (2, 5, 4)},
    "mimi": {"input_values": (2, 1, 1920)},
    "mimi_encoder": {"input_values": (2, 1, 1920)},
    "mm-grounding-dino": {"pixel_values": (2, 3, 64, 64)},
    "modernvbert": _TILES,
    "musicgen": {"decoder_input_ids": (8, 12)},
    "musicgen_melody": {"decoder_input_ids": (8, 12)},
    "nemotron3_5_asr": _FRAMES_FIRST,
    "nemotron3_5_transcribe_asr_audio": _FRAMES_FIRST,
    "nemotron3_5_transcribe_audio": _FRAMES_FIRST,
    "nemotron3_diarization": _FRAMES_FIRST,
    "nemotron3_diarization_audio": _FRAMES_FIRST,
    "nemotron_asr_streaming": _FRAMES_FIRST,
    "nemotron_asr_streaming_encoder": _FRAMES_FIRST,
    "paddleocr_vl": {"pixel_values": (32, 3, 8, 8)},
    "parakeet_ctc": _FRAMES_FIRST,
    "parakeet_encoder": _FRAMES_FIRST,
    "parakeet_rnnt": _FRAMES_FIRST,
    "parakeet_tdt": _FRAMES_FIRST,
    "patchtsmixer": {"past_values": (2, 32, 1)},
    "patchtst": {"past_values": (2, 32, 1)},
    "perceiver": {"inputs": ("ids", 2, 12)},
    "pocket_tts_audio_tokenizer": {"input_values": (2, 1, 1920)},
    "pocket_tts_audio_tokenizer_encoder": {"input_values": (2, 1, 1920)},
    "seggpt": {"prompt_pixel_values": (2, 3, 32, 32), "prompt_masks": (2, 3, 32, 32)},
    "siglip2": _PATCHES,
    "siglip2_vision_model": _PATCHES,
    "smolvlm": _TILES,
    "speech_to_text": {"input_features": (2, 64, 80)},
    "time_series_transformer": _TIME,
    "vibevoice_acoustic_tokenizer": {"input_values": (2, 1, 3200)},
    "vibevoice_acoustic_tokenizer_encoder": {"hidden_states": (2, 1, 3200)},
    "wav2vec2-bert": {"input_features": (2, 64, 64)},
    "xclip": {"pixel_values": (2, 8, 3, 32, 32)},
    "xcodec": {"input_values": (2, 1, 3200)},
}
# model_type -> why it is not swept.
NOT_SWEPT: dict[str, str] = {}
# model_type -> why a layer that the float model trains is not called in a latent one.
NOT_IN_TRAINING: dict[str, str] = {}
