"""Packed finetuning and pretraining of SmolLM2 on llm-foundry and Composer."""

__version__ = "0.1.0"
