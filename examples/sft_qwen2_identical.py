"""Heads that start as the model's own output matrix: they begin by saying what the model says.

python examples/sft_qwen2_identical.py [--model NAME_OR_FOLDER] [--dataset NAME_OR_FILE] [--max_steps N]
"""

from __future__ import annotations

from example import arguments, load

from foretell.trl import SFTConfig, SFTTrainer

args = arguments("Qwen/Qwen2.5-0.5B")
trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        use_cpu=args.cpu,
        bf16=not args.cpu,
        mtp_enabled=True,
        mtp_head_type="identical",
        mtp_init_strategy="copy_lm_head",
        mtp_num_predictions=2,
        mtp_loss_weight=0.3,
        num_train_epochs=3,
    ),
    train_dataset=load(args.dataset),
)
trainer.train()
trainer.save_model()  # the model, and mtp_config.json with mtp_model.safetensors beside it
