"""How many directions a matrix needs: rank by spectral energy, and ranks that change during training."""
