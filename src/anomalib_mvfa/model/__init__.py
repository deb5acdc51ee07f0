"""The model: frozen CLIP with trained adapters, memory bank, fusion, and its Lightning wrapper."""
