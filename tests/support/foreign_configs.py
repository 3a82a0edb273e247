"""Configurations as users of Axolotl, LLaMA-Factory and TRL write them; every line is of this repository."""

QLORA = """\
base_model: my-org/base-7b
model_type: LlamaForCausalLM
load_in_4bit: true
datasets:
  - path: rows/answers.jsonl
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./out/first try
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
my_own_key: 3
special_tokens:
  pad_token: "<pad>"
"""

DPO = """\
base_model: my-org/chat-8b
load_in_8bit: true
chat_template: llama3
rl: dpo
datasets:
  - path: my-org/pairs
    split: train
    type: chat_template.default
    field_messages: conversation
    field_chosen: better
    roles: {user: [user, human], assistant: [assistant, narrator]}
adapter: lora
lora_r: 8
lora_alpha: 8
lora_target_modules: [q_proj, v_proj]
micro_batch_size: 2
learning_rate: 0.00001
rl_beta: 0.2
precompute_ref_log_probs: true
fsdp: [full_shard]
fsdp_config:
  fsdp_offload_params: true
"""

FACTORY = """\
model_name_or_path: my-org/chat-4b
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine, other
template: qwen3_nothink
cutoff_len: 1024
max_samples: 1000
output_dir: saves/one
logging_steps: 10
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
deepspeed: ds_z3_config.json
report_to: none
"""

FACTORY_INFO = """\
{"mine": {"file_name": "mine.json", "columns": {"prompt": "question", "response": "answer"}},
 "other": {"hf_hub_url": "my-org/other", "split": "test"}}
"""

COMMAND = """\
#!/bin/bash
MODEL=my-org/base-1b
export NAME="run a"
accelerate launch --num_processes 4 --config_file deepspeed_zero3.yaml examples/scripts/dpo.py \\
    --model_name_or_path ${MODEL} \\
    --dataset_name my-org/pairs --dataset_config plain \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps=4 \\
    --max_steps 100 --warmup_steps 7 --loss_type ipo --beta 0.3 \\
    --use_peft --lora_r 4 --lora_alpha 4 --lora_target_modules q_proj v_proj \\
    --output_dir "$NAME" --eval_strategy steps --eval_steps 20 --no_remove_unused_columns \\
    --seed $SEED
"""

SFT_SCRIPT = """\
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

open("executed", "w").close()
RATE = 2e-4
rows = load_dataset("json", data_files="rows.jsonl", split="train")
quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4",
                               bnb_4bit_compute_dtype=torch.bfloat16)
args = SFTConfig(
    output_dir="out/mine",
    learning_rate=RATE / 2,
    num_train_epochs=2,
    per_device_train_batch_size=4,
    max_length=512,
    packing=True,
    assistant_only_loss=True,
    lr_scheduler_type="constant_with_warmup",
    warmup_ratio=0.05,
    optim="adamw_bnb_8bit",
    run_name=name_of_today(),
    **further,
)
trainer = SFTTrainer(
    model="my-org/base-1b",
    args=args,
    train_dataset=rows,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True),
    formatting_func=lambda row: row["text"],
)
"""

GRPO_SCRIPT = """\
from trl import GRPOConfig, GRPOTrainer

def lengths(completions, **kwargs):
    return [len(text) for text in completions]

GRPOTrainer(
    model="my-org/base-1b",
    reward_funcs=[lengths],
    args=GRPOConfig(
        output_dir="grpo",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_generations=4,
        max_completion_length=256,
        num_iterations=2,
        epsilon=0.1,
        loss_type="dr_grpo",
        scale_rewards=False,
        use_vllm=True,
    ),
).train()
"""
