"""Fine-tuning methods on peft: LoRA, DoRA, rsLoRA and PiSSA."""
