"""The keywords of `modeling_can.pretrain` and `evaluate`, for editors; a test compares them with the settings."""

from typing import TypedDict


__all__ = ["Evaluation", "Pretraining"]


class Pretraining(TypedDict, total=False):
    """The keys of a recipe."""

    dataset_name: str | None
    data_dir: str | None
    data_files: str | list[str] | None
    streaming: bool
    dataset_config_name: str | None
    dataset_split: str
    image_column: str
    max_bad_fraction: float
    transparent_background: str
    high_bit_depth: str
    pixel_range: tuple[float, ...] | None
    display_channels: tuple[int, ...] | None
    probe_dataset_name: str | None
    probe_dataset_config_name: str | None
    probe_train_split: str
    probe_test_split: str
    probe_label_column: str
    probe_image_column: str | None
    probe_every: int
    dataloader_num_workers: int
    shuffle_block_size: int
    data_on_device: bool | str
    num_views: int
    crop_scale: tuple[float, ...]
    crop_ratio: tuple[float, ...]
    resample: str
    flip_probability: float
    vertical_flip_probability: float
    quarter_turn_probability: float
    color_jitter: tuple[float, ...]
    color_jitter_probability: float
    grayscale_probability: float
    blur_probability: float
    blur_sigma: tuple[float, ...]
    solarize_probability: float
    measure_mean_std: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    max_steps: int | None
    num_train_epochs: float | None
    num_train_samples: int | None
    model_name_or_path: str | None
    layer_decay: float
    frozen_encoder_ratio: float
    per_device_train_batch_size: int | str
    gradient_accumulation_steps: int
    gradient_caching: bool
    base_learning_rate: float
    warmup_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    on_nonfinite: str
    mixed_precision: str
    tf32: bool
    gradient_checkpointing: bool
    torch_compile: bool | str
    seed: int
    output_dir: str
    overwrite_output_dir: bool
    save_steps: int
    save_total_limit: int
    resume_from_checkpoint: str | None
    logging_steps: int
    log_with: str | None
    license: str | None
    preflight: bool
    push_to_hub: bool
    hub_model_id: str | None
    hub_private: bool
    hub_strategy: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float | int
    attention_probs_dropout_prob: float | int
    drop_path_rate: float | int
    initializer_range: float | int
    layer_norm_eps: float | int
    image_size: int | list[int] | tuple[int, int]
    patch_size: int | list[int] | tuple[int, int]
    num_channels: int
    qkv_bias: bool
    key_bias: bool
    gated_mlp: bool
    num_register_tokens: int
    position_embedding_type: str
    rope_theta: float | int
    interpolate_antialias: bool
    decoder_hidden_size: int
    decoder_num_hidden_layers: int
    decoder_num_attention_heads: int
    decoder_intermediate_size: int
    mask_ratio: float | int
    noise_std_max: float | int
    noise_level_embedding: bool
    projection_hidden_size: int | None
    projection_size: int
    temperature: float | int
    contrastive_loss_weight: float | int
    reconstruction_loss_weight: float | int
    denoising_loss_weight: float | int
    norm_pix_loss: bool
    noise_head: str
    norm_noise_loss: bool


class Evaluation(TypedDict, total=False):
    """The flags of `modeling-can eval`."""

    model_name_or_path: tuple[str, ...]
    task: tuple[str, ...]
    output_dir: str
    dataset_name: str | None
    dataset_config_name: str | None
    train_split: str
    test_split: str
    test_size: float | None
    image_column: str
    label_column: str | None
    mask_column: str
    ignore_index: int
    processor_name_or_path: str | None
    image_size: tuple[int, ...] | None
    transparent_background: str | None
    high_bit_depth: str | None
    pixel_range: tuple[float, ...] | None
    pooling: str
    baselines: tuple[str, ...] | None
    trust_remote_code: bool
    batch_size: int
    dataloader_num_workers: int
    mixed_precision: str
    feature_cache: str | None
    seed: int
    export_classifier: str | None
    update_card: bool
    sgd_num_epochs: int
    sgd_batch_size: int
    sgd_base_learning_rates: tuple[float, ...]
    sgd_layers: tuple[int, ...]
    shots: tuple[str, ...]
    num_draws: int
    corruptions: tuple[str, ...]
    reference_model: str | None
    further_sets: str | None
    data_dir: str | None
    data_files: str | None
    dataset_split: str
    streaming: bool
    id_column: str | None
    embedding_dtype: str
    rows_per_file: int
    max_bad_fraction: float
    finetune_num_epochs: int
    finetune_batch_size: int
    finetune_gradient_accumulation_steps: int
    finetune_base_learning_rate: float | None
    finetune_layer_decay: float | None
    finetune_warmup_ratio: float
    finetune_weight_decay: float
    finetune_drop_path_rate: float
    finetune_label_smoothing: float
    finetune_mixup_alpha: float
    finetune_cutmix_alpha: float
    finetune_flip_probability: float
    finetune_randaugment_magnitude: float
    finetune_random_erasing_probability: float
    finetune_lora_rank: int
