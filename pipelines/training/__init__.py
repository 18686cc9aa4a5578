"""Training: what `pretrain` and `finetune` share, from the driver down to one optimizer step."""
