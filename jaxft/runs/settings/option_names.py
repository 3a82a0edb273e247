"""Options of TRL, PEFT, Axolotl, LLaMA-Factory and Unsloth, and the settings of jaxft that do the same.

One row is one option of one or more tools. Names are read without regard to case, and `-` is `_`. The same
name may mean different things in different tools or trainers, such as `loss_type`, and then has several rows.

Sources, all of the summer of 2026: trl 1.16 (trainer/*_config.py, scripts/utils.py), transformers 5
(TrainingArguments), peft 0.21 (LoraConfig), axolotl (utils/schemas), LLaMA-Factory (hparams), unsloth
(models/loader.py, models/families/llama.py).
"""

from jaxft.runs.settings.option import Option, absent, combined, mapped, normalised, options, same, unneeded

_OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_apex_fused", "adamw"), ""
    ),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "ao_adamw_8bit", "adamw_torch_8bit"), "optim.optimizer=adamw_8bit"
    ),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "optim.optimizer=adamw"),
    "paged_adamw_8bit": "optim.optimizer=adamw_8bit",
    **dict.fromkeys(("paged_lion", "paged_lion_32bit", "paged_lion_8bit"), "optim.optimizer=lion"),
    "adafactor": "optim.optimizer=adafactor",
    "lion": "optim.optimizer=lion",
    "lion_32bit": "optim.optimizer=lion",
    "muon": "optim.optimizer=muon",
    "schedule_free_adamw": "optim.optimizer=schedule_free_adamw optim.schedule=constant",
    "sgd": "optim.optimizer=optax:sgd",
    "rmsprop": "optim.optimizer=optax:rmsprop",
    "adagrad": "optim.optimizer=optax:adagrad",
}
_SCHEDULES = {
    "cosine": "optim.schedule=cosine optim.end=0",
    "linear": "optim.schedule=linear optim.end=0",
    "constant": "optim.schedule=constant optim.warmup=0",
    "constant_with_warmup": "optim.schedule=constant",
    "cosine_with_restarts": "optim.schedule=cosine_with_restarts optim.end=0",
    "cosine_with_min_lr": "optim.schedule=cosine",
    "warmup_stable_decay": "optim.schedule=wsd optim.end=0",
}
_DPO_LOSSES = {
    "sigmoid": "",
    **{
        name: f"loss={name}"
        for name in (
            "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sigmoid_norm",
        )
    },
    "sft": "loss=nll",
    "aot_pair": "loss=aot",
}  # fmt: skip
_TEMPLATES = {
    **{name: f"chat_template={name}" for name in ("chatml", "llama3", "gemma", "zephyr")},
    "qwen": "chat_template=qwen", "qwen_25": "chat_template=qwen",
    "mistral": "chat_template=mistral", "mistral_v2v3": "chat_template=mistral",
    "phi": "chat_template=phi3", "phi_3": "chat_template=phi3", "phi_35": "chat_template=phi3",
    "phi4": "chat_template=phi4", "gemma3": "chat_template=gemma",
    "llama-3": "chat_template=llama3", "qwen-2.5": "chat_template=qwen", "phi-3": "chat_template=phi3",
    "phi-4": "chat_template=phi4", "gemma-3": "chat_template=gemma",
    "tokenizer_default": "",
}  # fmt: skip

OPTIONS: tuple[Option, ...] = tuple(
    option
    for rows in (
        # The model
        same("model_name_or_path:tf", "model", "org/name"),
        same("base_model:a", "model", "org/name"),
        same("model_name:u", "model", "org/name"),
        combined("model_revision:tafu revision:tafu", "model", "write model=org/name@revision"),
        same("adapter_name_or_path:f lora_model_dir:a", "start", "runs/other"),
        mapped("dtype:tfu torch_dtype:tfu model_dtype:tfu", "dtype",
               {"bfloat16": "dtype=bfloat16", "float32": "", "auto": "", "float16": ""},
               "dtype is the compute dtype, bfloat16 by default; trained weights are stored in float32"),
        mapped("bf16:tafu bfloat16:tafu", "dtype", {"true": "dtype=bfloat16", "auto": "", "false": "",
               "full": ""},
               "bfloat16 is the default"),
        mapped("fp16:tafu float16:tafu", "dtype", {"true": "dtype=bfloat16", "false": "", "auto": ""},
               "bfloat16 in place of float16; it needs no loss scaling"),
        mapped("float32:a", "dtype", {"true": "dtype=float32", "false": ""}),
        mapped("pure_bf16:f", "params", {"true": "params=bfloat16", "false": ""},
               "of full fine-tuning: weights are stored in bfloat16 and updates are rounded stochastically",
               "sft_full"),
        mapped("load_in_4bit:tafu", "quant", {"true": "quant=nf4", "false": ""},
               "quant=nf4 stores the frozen base in 4 bits with doubly quantised scales; quant=fp4 for fp4"),
        mapped("load_in_8bit:tafu", "quant", {"true": "quant=int8", "false": ""}),
        mapped("load_in_fp8:u", "quant", {"true": "quant=fp8", "block": "quant=fp8", "false": ""}),
        mapped("quantization_bit:f", "quant", {"4": "quant=nf4", "8": "quant=int8"},
               "4 bits are quant=nf4, 8 bits quant=int8; GPTQ, AWQ and GGUF files are quant=checkpoint"),
        mapped("bnb_4bit_quant_type:tfp quantization_type:f", "quant",
               {"nf4": "quant=nf4", "fp4": "quant=fp4"}),
        combined("use_bnb_nested_quant:t bnb_4bit_use_double_quant:tfp double_quantization:f",
                 "quant.double",
                 "scales are doubly quantised by default; quant.double=false for plain ones"),
        mapped("gptq:a", "quant", {"true": "quant=checkpoint", "false": ""},
               "quant=checkpoint uses the packed weights of the files"),
        mapped("quantization_method:f", "quant",
               {"bnb": "", "bitsandbytes": "", "gptq": "quant=checkpoint", "awq": "quant=checkpoint"}),
        unneeded("bnb_4bit_compute_dtype:tafup bnb_4bit_quant_storage:tafup bnb_config_kwargs:a "
                 "quantization_device_map:f upcast_layernorm:f upcast_lmhead_output:f "
                 "embeddings_skip_upcast:a float32_mixed_precision:u peft_autocast_adapter_dtype:a "
                 "autocast_adapter_dtype:tafu cast_lm_head_to_fp32:tu fp32_norms:a",
                 "matmuls run in dtype, sums, norms and the loss in float32"),
        unneeded("model_type:tafu tokenizer_type:af auto_model:u base_model_config:a "
                 "tokenizer_config:tafu task_type:tafup lora_task_type:tu peft_type:taup "
                 "inference_mode:tafup is_llama_derived_model:a is_mistral_derived_model:a "
                 "is_qwen_derived_model:a is_falcon_derived_model:a use_fast_tokenizer:f "
                 "tokenizer_use_fast:a tokenizer_legacy:a low_cpu_mem_usage:afu device_map:tafup "
                 "cls_model_config:a fix_tokenizer:fu text_only:au", "read from the model's files"),
        unneeded("num_labels:taf num_completions_to_print:ta strict:a log_unique_prompts:t "
                 "log_multimodal:t is_preprocess:a",
                 "nothing that a run depends on"),
        absent("formatting_func:tu compute_metrics:tfu callbacks:tfu data_collator:tfu "
               "preprocess_logits_for_metrics:tfu optimizers:tfu",
               "code; write rows in their final form, scores as functions (score=my.py:name), losses as "
               "loss=my.py:name"),
        unneeded("trust_remote_code:tafu", "jaxft runs no code from a model's or a dataset's repository"),
        unneeded("hub_token:tafu hf_hub_token:f token:tafu hf_use_auth_token:a use_auth_token:tau "
                 "ms_hub_token:f om_hub_token:f", "set HF_TOKEN in the environment"),
        unneeded("cache_dir:afu", "set HF_HOME or JAXFT_CACHE in the environment"),
        same("add_tokens:af tokens:af", "add_tokens", ["<tool>", "</tool>"]),
        same("add_special_tokens:af additional_special_tokens:af", "add_special_tokens",
             ["<think>", "</think>"]),
        combined("special_tokens:a", "add_special_tokens",
                 "additional_special_tokens are add_special_tokens=; BOS and padding are the tokenizer's, "
                 "and the end of a turn is the chat template's (<|im_end|>: chat_template=chatml)"),
        combined("eos_token:tafu eot_tokens:a", "chat_template",
                 "the token that ends turns is the chat template's, such as <|im_end|> with "
                 "chat_template=chatml, and of plain text the tokenizer's"),
        unneeded("resize_vocab:f resize_token_embeddings_to_32x:a pad_token:tafu "
                 "bos_token:afu unk_token:au shrink_embeddings:a mean_resizing_embeddings:a",
                 "the table grows with the tokens, ends of turns are the chat template's, and "
                 "padding needs no token"),
        absent("rope_scaling:tafu shift_attn:f s2_attention:a use_pose:a",
               "there is no setting for longer contexts; use a model with them, or edit rope_scaling in a "
               "copy of its config.json"),
        absent("mixture_of_depths:f router_aux_loss_coef:tafu moe_aux_loss_coef:f quantize_moe_experts:a "
               "experts_implementation:a llama4_linearized_experts:a",
               "mixtures of experts are not supported", "0.001 0.0 0"),
        absent("processor_type:a freeze_mm_modules:a image_max_pixels:f image_min_pixels:f "
               "video_max_pixels:f video_fps:f video_maxlen:f freeze_vision_tower:f "
               "freeze_multi_modal_projector:f freeze_language_model:f",
               "images and video are not supported; text decoders of vision models are: jaxft help "
               "text-parts-of-vision-models", "true"),
        absent("qat:a quantization:a",
               "there is no quantisation-aware training; after the run: jaxft quantize"),
        combined("export_dir:f export_size:f export_device:f export_legacy_format:f "
                 "export_quantization_bit:f merge_lora:a",
                 None, "after the run: jaxft export --run runs/NAME --out merged"),
        # Rows
        same("dataset:tfu dataset_name:tfu", "data", "org/name:train",
             "a file, a folder or org/name[:split]; several with commas"),
        combined("datasets:ta pretraining_dataset:a", "data",
                 "data=a.jsonl,org/name:train; weights after a colon"),
        combined("dataset_config:tu dataset_train_split:tu split:tu", "data",
                 "write data=org/name/config:split"),
        combined("test_datasets:a eval_dataset:tafu dataset_test_split:tu", "held_out",
                 "held_out=FILE, or a fraction of the rows"),
        options("val_set_size:a val_size:f test_split_size:t", setting="held_out", example=0.1,
                note="a fraction of the rows, or a file",
                values={"0": "held_out=none", "0.0": "held_out=none"}),
        combined("dataset_dir:f media_dir:f", None, "data= takes paths; there is no list of datasets"),
        same("max_length:t", "max_length", 2048),
        same("max_seq_length:tafu max_seq_len:a cutoff_len:f sequence_len:a model_max_length:tafu",
             "max_length", 2048),
        same("max_prompt_length:ta max_prompt_len:a", "max_prompt", 512,
             "of rollouts; in SFT and preferences max_length is for prompt and response together", "grpo"),
        mapped("excess_length_strategy:a", "data.too_long",
               {"drop": "data.too_long=drop", "truncate": "data.too_long=truncate",
                "raise": "data.too_long=error"}),
        mapped("truncation_mode:t", "data.too_long", {"keep_start": "data.too_long=truncate"},
               "the start of a long row is kept; keep_end has no equivalent, use data.too_long=drop"),
        mapped("packing:tafu sample_packing:tafu", "data.packing",
               {"true": "data.packing=true", "false": "data.packing=false"},
               "with data.packing=true (the default) batch counts packed rows of max_length tokens"),
        mapped("neat_packing:f", "data.packing", {"true": "data.packing=true", "false": ""},
               "examples of a packed row never attend to one another"),
        mapped("packing_strategy:t", "data.packing",
               {"bfd": "data.packing=true", "bfd_split": "data.packing=true data.too_long=split",
                "wrapped": "data.packing=wrapped data.too_long=split"}),
        unneeded("eval_packing:tu eval_sample_packing:a sample_packing_eff_est:a "
                 "sample_packing_group_size:a sample_packing_bin_size:a sample_packing_sequentially:a "
                 "sample_packing_mp_start_method:a pad_to_sequence_len:a pad_to_multiple_of:tafu "
                 "padding_free:tafu batch_flattening:a group_by_length:tafu train_sampling_strategy:tafu "
                 "length_column_name:tafu multipack_real_batches:a dpo_padding_free:a eval_sequence_len:a",
                 "rows are packed, and shapes are chosen, without settings"),
        mapped("train_on_inputs:a train_on_prompt:f", "data.loss_on",
               {"true": "data.loss_on=all", "false": ""}, "responses alone are trained on by default"),
        mapped("assistant_only_loss:t", "data.loss_on",
               {"true": "data.loss_on=assistant", "false": "data.loss_on=all"}),
        mapped("completion_only_loss:t", "data.loss_on",
               {"true": "data.loss_on=completion", "false": "data.loss_on=all"}),
        mapped("mask_history:f", "data.loss_on", {"true": "data.loss_on=completion", "false": ""}),
        combined("roles_to_train:a train_on_eos:a train_on_eot:a", "data.loss_on",
                 "assistant turns with the token that ends them are trained on; data.loss_on=all for all "
                 "roles"),
        combined("dataset_text_field:tu text_column:au field:tau", "data.columns",
                 "data.columns=text=THEIRS"),
        combined("field_messages:a field_instruction:a field_input:a field_output:a field_system:a "
                 "field_tools:a field_chosen:a field_rejected:a field_prompt:a field_completion:a "
                 "field_label:a message_property_mappings:a message_field_role:a message_field_content:a "
                 "roles:a",
                 "data.columns",
                 "data.columns=messages=THEIRS,tools=THEIRS; messages have role and content, "
                 "or from and value"),
        options("chat_template:au chat_template_jinja:a template:f", setting="chat_template",
                kind="together",
                note="chat_template=chatml, another name or a .jinja file; by default the model's own",
                values=_TEMPLATES),
        same("chat_template_path:t", "chat_template", "chatml",
             "a .jinja file or a name; not a folder with a tokenizer"),
        same("chat_template_kwargs:ta", "data.chat_template_kwargs", "enable_thinking=false"),
        mapped("enable_thinking:f", "data.chat_template_kwargs",
               {"true": "data.chat_template_kwargs=enable_thinking=true",
                "false": "data.chat_template_kwargs=enable_thinking=false"}),
        absent("preserve_thinking:f default_system:f default_system_message:a tool_format:f",
               "decided by the rows and the chat template; a column `system` has a row's system message"),
        combined("interleave_probs:f", "data", "data=a.jsonl:0.3,b.jsonl:0.7"),
        mapped("mix_strategy:f", "data", {"concat": ""}, "an epoch has every row once, or with "
               "weights (data=a.jsonl:0.3) each source's fraction"),
        same("max_samples:af", "data.max_samples", 1000, "the first rows of each dataset"),
        absent("fraction:taf dataset_shard_num:a shards:taf", "data.max_samples=1000 reads the first rows"),
        mapped("dataset_exact_deduplication:a", "data.drop", {"true": "data.drop=duplicates", "false": ""}),
        unneeded("dataset_prepared_path:a tokenized_path:f overwrite_cache:f push_dataset_to_hub:a "
                 "streaming:tafu buffer_size:af "
                 "streaming_multipack_buffer_size:a dataset_streaming:tu preprocessing_batch_size:f "
                 "dataset_keep_in_memory:a skip_prepare_dataset:tau dataset_kwargs:tafu "
                 "remove_unused_columns:tafu data_shared_file_system:f remove_columns:tafu "
                 "ignore_pad_token_for_loss:f preprocess_iterable:a",
                 "rows are tokenised chunk by chunk and cached in JAXFT_CACHE"),
        same("dataset_num_proc:tau preprocessing_num_workers:f dataset_processes:a", "data.workers", 4,
             "processes that tokenise; by default one per CPU for large data"),
        unneeded("dataloader_num_workers:tafu dataloader_pin_memory:tafu dataloader_prefetch_factor:tafu "
                 "dataloader_persistent_workers:tafu dataloader_drop_last:tafu dataloader_in_order:tafu",
                 "batches are prepared while the step runs, from files in memory"),
        absent("disable_shuffling:f curriculum_sampling:a",
               "every epoch is shuffled; data.order_by=COLUMN orders it by a column of numbers"),
        absent("shuffle_dataset:ta shuffle_merged_datasets:a",
               "every epoch is shuffled; data.order_by=COLUMN orders it by a column of numbers", "true"),
        # Batches and length
        combined("per_device_train_batch_size:tafu micro_batch_size:tafu batch_size:tafu "
                 "gradient_accumulation_steps:tafu auto_find_batch_size:tafu", "batch",
                 "batch is the rows of an optimizer step (in SFT packed rows of several examples): "
                 "per-device batch x accumulation x devices; micro divides them into microbatches, with "
                 "the same gradients"),
        unneeded("per_device_eval_batch_size:tafu eval_batch_size:tafu precompute_ref_batch_size:tu "
                 "eval_accumulation_steps:tafu average_tokens_across_devices:tafu "
                 "ds3_gather_for_generation:tau",
                 "evaluation uses batches of the size of training; losses are sums over all devices"),
        same("num_train_epochs:tafu num_epochs:tafu", "epochs", 3),
        options("max_steps:tafu", setting="loop.steps", example=1000, values={"-1": "", "0": ""}),
        same("seed:tafu random_state:tu", "seed", 42),
        unneeded("data_seed:tafu full_determinism:tafu", "seed is for all of a run, which is deterministic"),
        # Optimizer
        same("learning_rate:tafu", "lr", 1e-4),
        mapped("optim:tafu optimizer:tafu", "optim.optimizer", _OPTIMIZERS,
               "there are adamw, adamw_8bit, adafactor, lion, muon, schedule_free_adamw and optax:NAME; the "
               "state is never paged, optim.layerwise=true needs less memory"),
        same("optim_args:tafu", "optim.optimizer_kwargs", "b1:0.9"),
        same("adam_beta1:tafu", "optim.b1", 0.9),
        same("adam_beta2:tafu", "optim.b2", 0.95),
        same("adam_epsilon:tafu", "optim.eps", 1e-8),
        same("weight_decay:tafu", "optim.weight_decay", 0.01, "of matrices only"),
        options("max_grad_norm:tafu", setting="optim.clip", note="optim.clip=none for no clipping",
                example=1.0,
                values={"0": "optim.clip=none", "0.0": "optim.clip=none"}),
        mapped("lr_scheduler_type:tafu lr_scheduler:tafu", "optim.schedule", _SCHEDULES,
               "there are cosine, linear, constant, cosine_with_restarts and wsd, and a function of yours"),
        combined("lr_scheduler_kwargs:tafu", "optim.schedule_kwargs",
                 "num_cycles is optim.schedule_kwargs=cycles:4, min_lr_rate is optim.end=0.1"),
        same("cosine_min_lr_ratio:a", "optim.end", 0.1),
        absent("cosine_constant_lr_ratio:a lr_quadratic_warmup:a lr_div_factor:a relora:a "
               "jagged_restart_steps:a", "use a schedule of your own, optim.schedule=file.py:name"),
        same("warmup_ratio:tafu", "optim.warmup", 0.03, "below 1 a fraction of the steps"),
        same("warmup_steps:tafu", "optim.warmup", 100, "from 1 on a number of steps"),
        same("loraplus_lr_ratio:af", "lora_plus", 16),
        unneeded("loraplus_lr_embedding:af", "1e-6, PEFT's default"),
        absent("embedding_lr:au embedding_lr_scale:a lr_groups:a embedding_learning_rate:u",
               "of full fine-tuning: optim.lr_groups=base/embed:0.1, a path pattern and a factor"),
        combined("loss_watchdog_threshold:a loss_watchdog_patience:a", "optim.skip_spikes",
                 "optim.skip_spikes=6,128 skips steps 6 standard deviations above the last 128"),
        mapped("use_muon:f", "optim.optimizer", {"true": "optim.optimizer=muon", "false": ""}),
        absent("use_galore:f use_apollo:f use_badam:f use_adam_mini:f qgalore_rank:a "
               "optim_target_modules:taf lisa_n_layers:a use_llama_pro:f",
               "not implemented; optim.layerwise=true and adamw_8bit need less memory"),
        # Loss
        same("label_smoothing_factor:tafu", "label_smoothing", 0.1),
        same("neftune_noise_alpha:tafu noisy_embedding_alpha:a", "neftune", 5),
        mapped("use_dft_loss:f", "dft", {"true": "dft=true", "false": ""}),
        mapped("loss_type:t", "dft", {"nll": "", "chunked_nll": "", "dft": "dft=true", "none": ""}),
        absent("use_asft_loss:f use_eaft_loss:f use_eaft:a",
               "not implemented; write the loss as a function of your own"),
        unneeded("use_liger_kernel:tafu enable_liger_kernel:f use_liger_loss:tau dpo_use_liger_kernel:a "
                 "liger_rope:a liger_rms_norm:a liger_glu_activation:a liger_swiglu:a liger_layer_norm:a "
                 "liger_fused_linear_cross_entropy:a liger_cross_entropy:a liger_kernel_config:tafu "
                 "cut_cross_entropy:a chunked_cross_entropy:a chunked_cross_entropy_num_chunks:a "
                 "flash_attn_cross_entropy:a flash_attn_rms_norm:a flash_attn_fuse_mlp:a "
                 "lora_mlp_kernel:a lora_qkv_kernel:a lora_o_kernel:a lora_embedding_kernel:a "
                 "unsloth_cross_entropy_loss:a unsloth_lora_mlp:a unsloth_lora_qkv:a unsloth_lora_o:a "
                 "use_kernels:af tiled_mlp:au",
                 "XLA fuses these, and the head and the loss are always computed in chunks"),
        # Adapters
        same("r:up", "rank", 16),
        same("lora_r:tau lora_rank:afu", "rank", 16),
        same("lora_alpha:tafup", "adapter.alpha", 32),
        same("lora_dropout:tafup", "adapter.dropout", 0.05),
        options("target_modules:tpu lora_target_modules:ta lora_target:f", setting="adapter.targets",
                note="module names, or a regular expression over paths", example=["q_proj", "v_proj"],
                values={"all": "adapter.targets=all-linear"}),
        mapped("lora_target_linear:a", "adapter.targets",
               {"true": "adapter.targets=all-linear", "false": ""}),
        same("exclude_modules:p", "adapter.exclude_modules", ["k_proj"]),
        same("modules_to_save:tafup lora_modules_to_save:tau additional_target:f", "adapter.modules_to_save",
             ["lm_head", "embed_tokens"]),
        same("bias:up", "adapter.bias", "lora_only"),
        mapped("use_rslora:tafup peft_use_rslora:a", "adapter.rslora",
               {"true": "adapter.rslora=true", "false": ""}),
        mapped("use_dora:tafup peft_use_dora:a", "adapter.dora",
               {"true": "adapter.dora=true", "false": ""}),
        mapped("init_lora_weights:aup peft_init_lora_weights:a", "adapter.init",
               {"true": "", "none": "", "gaussian": "", "pissa": "adapter.init=pissa",
                "olora": "adapter.init=olora", "eva": "adapter.init=eva",
                "loftq": "adapter.init=loftq quant=nf4"}),
        mapped("pissa_init:f", "adapter.init", {"true": "adapter.init=pissa", "false": ""}),
        unneeded("pissa_iter:f pissa_convert:f loftq_bits:afp",
                 "the exact singular vectors are used, and the export is for the unchanged base"),
        combined("loftq_config:aup eva_config:p", "adapter.init",
                 "adapter.init=loftq quant=nf4, or adapter.init=eva adapter.eva_rho=2.0"),
        same("rank_pattern:ap lora_rank_pattern:a", "adapter.rank_pattern", {"q_proj": 8}),
        same("alpha_pattern:ap lora_alpha_pattern:a", "adapter.alpha_pattern", {"q_proj": 16}),
        same("layers_to_transform:aup peft_layers_to_transform:a", "adapter.layers_to_transform",
             [0, 1, 2]),
        same("trainable_token_indices:ap peft_trainable_token_indices:a",
             "adapter.trainable_token_indices", [0, 1]),
        absent("target_parameters:taup lora_target_parameters:tau layer_replication:ap "
               "peft_layer_replication:a layers_pattern:aup peft_layers_pattern:a fan_in_fan_out:ap "
               "lora_fan_in_fan_out:a lora_bias:aup corda_config:p megatron_config:p use_qalora:p "
               "alora_invocation_tokens:p",
               "not implemented for adapters; leave it out"),
        unneeded("ensure_weight_tying:ap peft_ensure_weight_tying:a create_new_adapter:f",
                 "start=FOLDER continues an adapter; without it a new one is created"),
        mapped("finetuning_type:f", "full", {"lora": "", "full": "full=true"},
               "lora and full; for freeze use the recipe sft_full with train=base/layers/.*", "dpo"),
        mapped("adapter:a", "quant", {"lora": "", "qlora": "quant=nf4", "none": "", "": ""}),
        mapped("use_peft:t", "full", {"true": "", "false": "full=true"},
               "LoRA is the default of most recipes; sft_full, or full=true, trains all weights", "dpo"),
        mapped("full_finetuning:u", "full", {"true": "full=true", "false": ""}, "", "dpo"),
        same("unfrozen_parameters:a", "train", "base/layers/.*", "a pattern over paths", "sft_full"),
        absent("freeze_trainable_layers:f freeze_trainable_modules:f freeze_extra_modules:f "
               "finetune_last_n_layers:u",
               "with sft_full, train=base/layers/.* selects by path; adapter.layers_to_transform by layer"),
        # Computing
        mapped("gradient_checkpointing:tafu use_gradient_checkpointing:tafu activation_checkpointing:tafu",
               "remat",
               {"true": "remat=full", "false": "", "unsloth": "remat=full", "offload": "remat=offload",
                "offload_disk": "remat=offload"},
               "remat=full stores the least; projections or attention, the defaults, are faster"),
        mapped("disable_gradient_checkpointing:f", "remat", {"true": "remat=none", "false": ""}),
        mapped("activation_offloading:ta", "remat",
               {"true": "remat=offload", "legacy": "remat=offload", "disk": "remat=offload", "false": ""}),
        unneeded("gradient_checkpointing_kwargs:tafu activation_checkpointing_kwargs:tafu "
                 "use_reentrant_gc:f use_unsloth_gc:f selective_checkpointing:a",
                 "remat= has no further options"),
        unneeded("attn_implementation:tafu flash_attention:au flash_attn:afu xformers_attention:au "
                 "sdp_attention:a flex_attention:au sage_attention:a eager_attention:a "
                 "fused_attn_kernel:a use_unsloth:f block_diag_attn:f",
                 "the fastest attention that fits is chosen, and printed"),
        unneeded("torch_compile:tafu torch_compile_backend:tafu torch_compile_mode:tafu "
                 "torch_compile_options:au deepcompile:a", "every step is compiled"),
        unneeded("tokenizer_use_mistral_common:a experimental_skip_move_to_device:a infer_backend:f "
                 "flex_attn_compile_kwargs:a flash_optimum:a fp8_backend:f "
                 "fp8_enable_fsdp_float8_all_gather:af "
                 "tf32:tafu use_cache:tafu bf16_full_eval:tafu fp16_full_eval:tafu "
                 "torch_empty_cache_steps:tafu gc_steps:a gc_collect_steps:a use_cpu:tafu "
                 "ddp_timeout:tafu ddp_bucket_cap_mb:tafu ddp_broadcast_buffers:tafu "
                 "ddp_find_unused_parameters:tafu ddp_backend:tafu ddp_static_graph:tafu local_rank:tafu "
                 "world_size:tafu ddp:tafu dataloader_multiprocessing_context:tafu use_v1_kernels:f "
                 "include_for_metrics:tafu",
                 "a detail of PyTorch"),
        combined("fsdp:tafu fsdp_config:tafu fsdp_version:tafu deepspeed:tafu accelerator_config:tafu "
                 "parallelism_config:tafu use_hyper_parallel:f", "mesh.fsdp",
                 "mesh.fsdp=-1 shards weights, gradients and optimizer state over all devices; nothing is "
                 "offloaded to the CPU"),
        same("tensor_parallel_size:a", "mesh.tensor", 2),
        same("context_parallel_size:a sequence_parallel_degree:a", "mesh.context", 2),
        same("dp_shard_size:a", "mesh.fsdp", 8),
        same("dp_replicate_size:a", "mesh.data", 2),
        unneeded("ring_attn_func:a heads_k_stride:a", "context_keys=auto chooses"),
        mapped("fp8:af", "quant", {"true": "quant=fp8", "false": ""},
               "quant=fp8 multiplies the frozen base in FP8 on devices that can; the rest is bfloat16"),
        absent("layer_offloading:a lora_on_cpu:a max_memory:au gpu_memory_limit:a offload_embedding:u",
               "weights and optimizer state stay on the device; "
               "quant=nf4, remat=full and optim.layerwise=true need less of it"),
        # The run
        combined("output_dir:tafu", "name", "results are in runs/NAME"),
        same("run_name:tfu", "name", "mine", "results are in runs/mine"),
        same("wandb_name:a mlflow_run_name:a", "name", "mine"),
        unneeded("overwrite_output_dir:f do_train:tafu do_eval:tafu do_predict:tafu "
                 "resume_from_checkpoint:tafu auto_resume_from_checkpoints:a ignore_data_skip:tafu",
                 "the same command resumes a run; a new name= starts another"),
        same("logging_steps:tafu", "loop.log_every", 10),
        combined("eval_steps:tafu", "loop.eval_every", "steps between evaluations, loop.eval_every=100"),
        combined("save_steps:tafu", "loop.save_every", "steps between checkpoints, loop.save_every=100"),
        combined("evals_per_epoch:a eval_strategy:tafu evaluation_strategy:au", "loop.eval_every",
                 "intervals are in steps or, below 1, fractions of the run: loop.eval_every=0.25"),
        combined("saves_per_epoch:a save_strategy:tafu", "loop.save_every",
                 "intervals are in steps or, below 1, fractions of the run: loop.save_every=0.25"),
        same("save_total_limit:tafu", "loop.keep_last", 2),
        mapped("load_best_model_at_end:tafu", "loop.keep_best", {"true": "loop.keep_best=1", "false": ""},
               "the best step's weights are in best/"),
        combined("metric_for_best_model:tafu greater_is_better:tafu", "loop.best_metric",
                 "loop.best_metric=eval_loss loop.greater_is_better=false"),
        combined("early_stopping_patience:af early_stopping_steps:f", "loop.patience",
                 "evaluations without a better result before a run ends; needs loop.eval_every"),
        absent("early_stopping_threshold:tu", "loop.patience counts every better result, however small",
               "0 0.0"),
        mapped("report_to:tfu", "trackers",
               {"wandb": "trackers=wandb", "mlflow": "trackers=mlflow", "trackio": "trackers=trackio",
                "tensorboard": "", "none": "", "all": "", "[]": ""}, "every run writes TensorBoard's files"),
        combined("wandb_project:a mlflow_experiment_name:a trackio_project_name:a", "tracking.project",
                 "with trackers=wandb, mlflow or trackio"),
        options("project:tafu", setting="tracking.project", example="mine", values={"huggingface": ""}),
        mapped("use_wandb:a", "trackers", {"true": "trackers=wandb", "false": ""}),
        mapped("wandb_log_model:a", "tracking.artifact",
               {"end": "tracking.artifact=true", "checkpoint": "tracking.artifact=true",
                "false": "tracking.artifact=false"}, "the adapter is uploaded at the end by default"),
        mapped("use_mlflow:a", "trackers", {"true": "trackers=mlflow", "false": ""}),
        mapped("use_trackio:a", "trackers", {"true": "trackers=trackio", "false": ""}),
        unneeded("use_tensorboard:a plot_loss:f logging_dir:fu logging_first_step:tafu "
                 "logging_strategy:tafu log_level:tafu include_num_input_tokens_seen:tafu "
                 "include_tokens_per_second:au include_tkps:a disable_tqdm:tafu print_param_status:f "
                 "include_effective_tokens_per_second:f log_completions:tau",
                 "every run writes TensorBoard's files, curves, tokens per second and its completions"),
        absent("wandb_entity:a wandb_watch:a wandb_run_id:a wandb_mode:a mlflow_tracking_uri:a "
               "hf_mlflow_log_artifacts:a trackio_space_id:tafu",
               "set by the tracker's own environment variables, such as WANDB_ENTITY and WANDB_MODE"),
        absent("use_swanlab:af swanlab_project:af swanlab_run_name:f use_comet:a comet_project_name:a "
               "comet_workspace:a",
               "trackers are wandb, mlflow, trackio, or file.py:name of your own"),
        combined("push_to_hub:tafu hub_model_id:tafu hub_strategy:tafu hub_private_repo:tafu "
                 "hub_revision:tafu export_hub_model_id:f", None,
                 "after the run: jaxft push runs/NAME org/name"),
        absent("save_only_model:tafu save_on_each_node:tafu save_safetensors:afu save_first_step:a "
               "hub_always_push:tafu",
               "checkpoints have the optimizer's state too; loop.keep_last=1 keeps one", "true"),
        absent("ray_run_name:a use_ray:af ray_num_workers:af resources_per_worker:a ray_init_kwargs:f",
               "start the command in a job of Ray, "
               "see scripts/launch", "1"),
        # Preferences
        same("beta:t", "beta", 0.1, "", "dpo"),
        same("rl_beta:a dpo_beta:a pref_beta:f", "beta", 0.1, "", "dpo"),
        mapped("loss_type:t", "loss", _DPO_LOSSES, "", "dpo"),
        options("loss_type:t", setting=None, kind="absent", values={"kto": ""}, recipe="kto",
                note="the recipe kto has the loss kto; copy it for bco or apo_zero_unpaired of "
                "jaxft.objectives.losses.reference_free_losses"),
        mapped("pref_loss:f", "loss",
               {"sigmoid": "", "hinge": "loss=hinge", "ipo": "loss=ipo",
                "kto_pair": "", "orpo": "", "simpo": ""}, "orpo and simpo are recipes", "dpo"),
        combined("rl:a stage:af", None,
                 "a recipe: sft, dpo, kto, orpo, simpo, reward, grpo, ppo or online_dpo"),
        combined("dpo_loss_type:a dpo_loss_weights:a loss_weights:taf dpo_use_weighting:a "
                 "use_weighting:ta f_divergence_type:tf f_alpha_divergence_coef:t ld_alpha:tf rpo_alpha:a "
                 "pref_ftx:f dpo_norm_loss:a label_smoothing:taf dpo_label_smoothing:af discopop_tau:t "
                 "pref_bco_weight:f",
                 "loss", "write the mix or the variant as a function: loss=mine.py:loss, with mix, wpo, "
                 "length_desensitised or a score of jaxft.objectives.losses.preference_losses", "dpo"),
        mapped("precompute_ref_log_probs:ta", "reference",
               {"true": "reference=precomputed", "false": ""}, "", "dpo"),
        combined("sync_ref_model:ta ref_model_mixup_alpha:ta ref_model_sync_steps:ta", "moving",
                 "moving=0.6,512", "dpo"),
        same("ref_model:tf ref_model_adapters:f", "reference_model", "org/name", "", "dpo"),
        mapped("ref_model_quantization_bit:f", "reference_quant",
               {"4": "reference_quant=nf4", "8": "reference_quant=int8"}, "", "dpo"),
        unneeded("disable_dropout:tfu generate_during_eval:tfu is_encoder_decoder:tafu",
                 "base models have no dropout, and samples are printed anyway"),
        same("desirable_weight:taf kto_desirable_weight:a kto_chosen_weight:f",
             "desirable_weight", 1.0, "", "kto"),
        same("undesirable_weight:taf kto_undesirable_weight:a kto_rejected_weight:f",
             "undesirable_weight", 1.0, "", "kto"),
        same("simpo_gamma:taf", "gamma", 1.0, "", "simpo"),
        same("orpo_alpha:a", "beta", 0.1, "", "orpo"),
        combined("cpo_alpha:ta", "loss", "loss=cpo", "dpo"),
        same("center_rewards_coefficient:ta", "center", 0.01, "", "reward"),
        options("step_separator:ta", setting="data.separator", example="\n\n", note="\\n is a line break",
                values={"\n": "", "\n\n": "data.separator=\\n\\n"}, recipe="process_reward"),
        mapped("train_on_last_step_only:ta", "data.last_step_only",
               {"true": "data.last_step_only=true", "false": ""}, "", "process_reward"),
        combined("max_completion_length:ta", "max_length",
                 "max_length is for the prompt and all steps together", "process_reward"),
        # Rollouts
        same("num_generations:ta", "group", 8, "", "grpo"),
        same("max_completion_length:ta max_new_tokens:ta", "max_new", 256, "", "grpo"),
        same("temperature:ta", "temperature", 1.0, "", "grpo"),
        same("top_p:ta", "data.top_p", 0.95, "", "grpo"),
        same("min_p:ta", "data.min_p", 0.05, "", "grpo"),
        options("top_k:ta", setting="data.top_k", example=20, values={"0": ""}, recipe="grpo"),
        same("num_iterations:ta", "passes", 2, "", "grpo"),
        same("epsilon:ta", "eps_low", 0.2, "also eps_high, unless epsilon_high is set", "grpo"),
        same("epsilon_high:ta", "eps_high", 0.28, "", "grpo"),
        same("beta:ta", "beta", 0.04, "", "grpo"),
        mapped("loss_type:ta", "token_weights",
               {"dapo": "", "bnpo": "", "grpo": "token_weights=sequence_mean",
                "dr_grpo": "token_weights=constant_length", "cispo": "loss=cispo",
                "sapo": "loss=sapo", "vespo": "loss=vespo"}, "", "grpo"),
        mapped("scale_rewards:ta", "advantage",
               {"true": "", "group": "", "batch": "advantage=grpo_batch",
                "false": "advantage=centred", "none": "advantage=centred"},
               "", "grpo"),
        mapped("importance_sampling_level:ta", "loss",
               {"token": "", "sequence": "loss=gspo"}, "", "grpo"),
        mapped("mask_truncated_completions:ta", "train_on_truncated",
               {"true": "train_on_truncated=false", "false": ""}, "", "grpo"),
        same("reward_weights:ta", "reward_weights", [1.0], "", "grpo"),
        combined("reward_funcs:ta", "rewards",
                 "rewards=my_rewards.py:mine, a function (prompt, completion, row) -> float of one "
                 "completion",
                 "grpo"),
        combined("environment_factory:t", "environment",
                 "environment=my_env.py:Game with max_turns and max_episode, see grpo_tools.py", "grpo"),
        combined("tools:ta", "tools", "tools=my_tools.py:add,my_tools.py:search, see grpo_tools.py", "grpo"),
        combined("max_tool_calling_iterations:t", "max_turns",
                 "max_turns=3 max_episode=512: turns are one more than iterations of tool calls", "grpo"),
        combined("reward_model:tf reward_model_path:t reward_model_name_or_path:t", "reward_model",
                 "reward_model=org/name, or runs/reward", "grpo"),
        mapped("multi_objective_aggregation:ta", "estimate",
               {"sum_then_normalize": "", "normalize_then_sum": "estimate=by_each"},
               "", "grpo"),
        same("missing_eos_penalty:t", "missing_eos", 1.0, "", "grpo"),
        combined("steps_per_generation:ta generation_batch_size:ta", "minibatches",
                 "batch prompts are sampled at once and trained on in minibatches optimizer steps", "grpo"),
        unneeded("use_vllm:tau vllm_mode:tau vllm_server_host:tau vllm_server_port:tau "
                 "vllm_server_timeout:tau vllm_server_base_url:tu vllm_gpu_memory_utilization:tau "
                 "vllm_max_model_length:tau vllm_tensor_parallel_size:tau vllm_enable_sleep_mode:tau "
                 "vllm_model_impl:tau vllm_group_port:tu vllm_lora_sync:a vllm:tafu "
                 "use_transformers_paged:tu fast_inference:u gpu_memory_utilization:tafu "
                 "max_lora_rank:afu cache_implementation:tu",
                 "completions are sampled by jaxft on the training devices"),
        mapped("vllm_importance_sampling_mode:tau", "correction",
               {"token_truncate": "correction=truncated_tokens", "token_mask": "correction=masked_tokens",
                "sequence_truncate": "correction=truncated_completions",
                "sequence_mask": "correction=masked_completions"}, "", "grpo"),
        mapped("vllm_importance_sampling_correction:tau", "correction",
               {"true": "correction=masked_completions", "false": ""},
               "jaxft's own sampler differs from training by rounding alone", "grpo"),
        combined("vllm_importance_sampling_cap:tau vllm_importance_sampling_clip_max:tu "
                 "vllm_importance_sampling_clip_min:t", "correction_bounds",
                 "correction_bounds=0,3: the least and the largest weight", "grpo"),
        combined("delta:ta", "loss", "loss=dual_clip, whose max_ratio is delta (3 by default)", "grpo"),
        absent("repetition_penalty:ta generation_kwargs:ta top_entropy_quantile:ta "
               "entropy_coef:t vllm_guided_decoding_regex:a vllm_structured_outputs_regex:t "
               "rollout_func:ta",
               "not implemented for rollouts", "1.0 1 0.0 0"),
    )
    for option in rows
)  # fmt: skip

_BY_NAME: dict[str, list[Option]] = {}
for _option in OPTIONS:
    _BY_NAME.setdefault(_option.name, []).append(_option)


def find_options(name: str, tool: str | None = None, recipe: str | None = None) -> tuple[Option, ...]:
    """Return the options called `name` in other tools, () for an unknown name.

    tool: return only options of this tool, such as "TRL". recipe: if some of the options are for this recipe,
    return only these.
    """
    rows = tuple(
        option for option in _BY_NAME.get(normalised(name), ()) if tool is None or tool in option.tools
    )
    return tuple(option for option in rows if option.recipe == recipe) or rows
