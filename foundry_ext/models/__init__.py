"""SmolLM2 on packed documents: rope, variable-length attention, decoder, loss, FLOPs, memory."""
