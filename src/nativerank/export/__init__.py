"""Out of a run: a factored, dense, mixed or GGUF folder that is checked before it has its name."""
