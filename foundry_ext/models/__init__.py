"""SmolLM2 on packed sequences: rope, variable-length attention, decoder, loss, FLOPs, memory."""
