"""Two linear heads on a Qwen 2 model: the smallest change of a TRL script.

python examples/sft_qwen2_linear.py [--model NAME_OR_FOLDER] [--dataset NAME_OR_FILE] [--max_steps N]
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
        mtp_num_predictions=2,  # two tokens beyond the ordinary next one
        mtp_loss_weight=0.5,
        num_train_epochs=3,
        per_device_train_batch_size=4,
    ),
    train_dataset=load(args.dataset),
)
trainer.train()
trainer.save_model()  # the model, and mtp_config.json with mtp_model.safetensors beside it
