"""Choosing weights by name.

A pattern is a glob that is matched against the full dotted name and every dotted suffix of it: "q_proj", "*.mlp.*",
"layers.0.*". One that is the full name of a weight means that weight alone. A pattern that matches nothing is an
error, because a typing mistake must not silently factorize everything, or nothing.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

Patterns = str | Iterable[str]


def as_patterns(patterns: Patterns) -> list[str]:
    """A list, also of a single pattern."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob fits the dotted name or one of its dotted suffixes."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def match_all(patterns: Patterns, names: Collection[str], what: str) -> list[str]:
    """The names that match one of the patterns; a pattern without a match is an error that shows a few names."""
    matched: list[str] = []
    for pattern in as_patterns(patterns):
        hits = [pattern] if pattern in names else [name for name in names if matches(pattern, name)]
        if not hits:
            some = f" (they are called {', '.join(list(names)[:3])}, ...)" if names else ""
            raise ValueError(f"{what} pattern {pattern!r} matches none of the {len(names)} weights{some}")
        matched += hits
    return matched
