"""Many processes as one: the grid they form, what they exchange, and which part of a tensor each of them holds."""
