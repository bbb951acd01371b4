"""Small shared heads on a Mistral model that does not change at all: cheapest, and lossless for its users.

python examples/sft_mistral_frozen.py [--model NAME_OR_FOLDER] [--dataset NAME_OR_FILE] [--max_steps N]
"""

from __future__ import annotations

from example import arguments, load

from foretell.trl import SFTConfig, SFTTrainer

args = arguments("mistralai/Mistral-7B-v0.1")
trainer = SFTTrainer(
    model=args.model,
    args=SFTConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        use_cpu=args.cpu,
        bf16=not args.cpu,
        mtp_enabled=True,
        mtp_head_type="linear",
        mtp_share_unembedding=True,  # a head is one D x D matrix; the output matrix is the model's
        mtp_dropout_prob=0.0,
        mtp_num_predictions=2,
        mtp_loss_weight=0.4,
        mtp_training_mode="standalone",
        num_train_epochs=3,
    ),
    train_dataset=load(args.dataset),
)
trainer.train()
trainer.save_model()  # the model, and mtp_config.json with mtp_model.safetensors beside it
