"""Deep feed-forward heads on a Llama model, near tokens weighing more than far ones.

python examples/sft_llama_ffn.py [--model NAME_OR_FOLDER] [--dataset NAME_OR_FILE] [--max_steps N]
"""

from __future__ import annotations

from example import arguments, load

from foretell.trl import SFTConfig, SFTTrainer

args = arguments("meta-llama/Llama-3.2-1B")
trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        use_cpu=args.cpu,
        bf16=not args.cpu,
        mtp_enabled=True,
        mtp_head_type="ffn",
        mtp_num_layers=3,
        mtp_init_strategy="kaiming_uniform",
        mtp_num_predictions=3,
        mtp_loss_weight=0.3,
        mtp_weight_decay_strategy="harmonic",
        num_train_epochs=2,
    ),
    train_dataset=load(args.dataset),
)
trainer.train()
trainer.save_model()  # the model, and mtp_config.json with mtp_model.safetensors beside it
