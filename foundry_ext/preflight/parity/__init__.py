"""Compares SmolLM2ForCausalLM with transformers' LlamaForCausalLM, layer by layer."""
