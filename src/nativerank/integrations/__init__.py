"""nativerank inside other people's training loops."""
