"""Heads with causal attention of their own on DeepSeek-LLM (a Llama), long accumulation.

python examples/sft_deepseek_attention.py [--model NAME_OR_FOLDER] [--dataset NAME_OR_FILE] [--max_steps N]
"""

from __future__ import annotations

from example import arguments, load

from foretell.trl import SFTConfig, SFTTrainer

args = arguments("deepseek-ai/deepseek-llm-7b-base")
trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        use_cpu=args.cpu,
        bf16=not args.cpu,
        mtp_enabled=True,
        mtp_head_type="mha_ffn",
        mtp_num_layers=4,
        mtp_init_strategy="xavier_normal",
        mtp_num_predictions=4,
        mtp_loss_weight=0.2,
        mtp_weight_decay_strategy="harmonic",
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    ),
    train_dataset=load(args.dataset),
)
trainer.train()
trainer.save_model()  # the model, and mtp_config.json with mtp_model.safetensors beside it
