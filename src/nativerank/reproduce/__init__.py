"""Reproduction cards: published claims, run side by side, with a verdict that a function renders from the results."""
