"""The whole story on a CPU: a base model, four methods fine-tuned, learning and forgetting."""
