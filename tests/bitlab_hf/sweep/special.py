"""What the general rules get wrong, as data: one line for each architecture."""

from __future__ import annotations

from typing import Any

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 1}  # noqa: E501
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_WINDOWS = {"image_size": 64, "window_size": 2}
# model_type -> fields of its configuration; a dot leads into a nested one.
FIELDS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64},
    "autoformer": _SERIES,
    "bamba": _MAMBA,
    "blip-2": {"image_token_index": 11},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": _WINDOWS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 97, "pad_token_id": 1, "mask_token_id": 32},
    "exaone4_5_vision": {"window_size": 32},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "glm4v_moe_text": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},  # noqa: E501
    "glm4v_text": {"rope_parameters": _SECTIONS},
    "glm_image_text": {"rope_parameters": _SECTIONS},
    "glm_ocr_text": {"rope_parameters": _SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": _SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},  # noqa: E501
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"], "num_hidden_layers": 3},  # noqa: E501
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16},
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS},
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": {"rope_parameters": _SECTIONS},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [3, 4], "axial_pos_embds_dim": [32, 32]},
    "swin": _WINDOWS,
    "time_series_transformer": _SERIES,
    "wav2vec2-bert": {"vocab_size": 97},
    "wav2vec2-conformer": {"vocab_size": 97},
}
# model_type -> the class to build, where it is not the first of the automatic ones.
CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
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
    "bros": {"bbox": (2, 12, 8)},
    "canary": _FRAMES_FIRST,
    "clvp": {"input_features": (2, 80, 32)},
    "cohere_asr": _FRAMES_FIRST,
    "colmodernvbert": _TILES,
    "encodec": {"input_values": (2, 1, 640)},
    "idefics": _TILES,
    "idefics2": _TILES,
    "idefics3": _TILES,
    "informer": _TIME,
    "kosmos-2": {"image_embeds_position_mask": None},
    "lasr_ctc": _FRAMES_FIRST,
    "lasr_encoder": _FRAMES_FIRST,
    "mimi_encoder": {"input_values": (2, 1, 1920)},
    "modernvbert": _TILES,
    "nemotron3_5_asr": _FRAMES_FIRST,
    "nemotron3_5_transcribe_asr_audio": _FRAMES_FIRST,
    "nemotron3_5_transcribe_audio": _FRAMES_FIRST,
    "nemotron3_diarization": _FRAMES_FIRST,
    "nemotron3_diarization_audio": _FRAMES_FIRST,
    "nemotron_asr_streaming": _FRAMES_FIRST,
    "nemotron_asr_streaming_encoder": _FRAMES_FIRST,
    "parakeet_ctc": _FRAMES_FIRST,
    "parakeet_encoder": _FRAMES_FIRST,
    "parakeet_rnnt": _FRAMES_FIRST,
    "parakeet_tdt": _FRAMES_FIRST,
    "siglip2": _PATCHES,
    "siglip2_vision_model": _PATCHES,
    "smolvlm": _TILES,
    "speech_to_text": {"input_features": (2, 64, 32)},
    "time_series_transformer": _TIME,
}
# model_type -> why it is not swept.
NOT_SWEPT: dict[str, str] = {}
# model_type -> why a layer that the float model trains is not called in a latent one.
NOT_IN_TRAINING: dict[str, str] = {}
