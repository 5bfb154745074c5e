"""Training windows in a seeded order whose whole state is one counter.

    window i        tokens [i T, (i + 1) T] of the stream (T = context; T + 1 tokens give inputs and targets)
    sample g        window perm_e(g mod n) of epoch e = g // n, for g = 0, 1, 2, ... without end
    global batch b  samples [b B, (b + 1) B), B = batch_size * world_size; rank r takes the r-th contiguous part

perm_e is a bijection on n windows computed element by element (a Feistel network with cycle walking), so an order over
billions of windows needs no memory and resuming at any sample costs nothing.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from nativerank.data.shards import Split

FEISTEL_ROUNDS = 6
STATE_KEYS = ("samples", "seed", "context")
PAD_ID = 0


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection whose every output bit depends on
    every input bit. Arrays only: numpy lets those wrap around silently."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """One 64-bit key per Feistel round from (seed, epoch)."""
    words = [seed & (1 << 64) - 1, (seed >> 64) & (1 << 64) - 1, epoch]
    return np.random.SeedSequence(words).generate_state(FEISTEL_ROUNDS, np.uint64)


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a pseudorandom bijection of {0 .. n-1} sends each index; O(1) memory in n.

    A Feistel network permutes the next power of four; results >= n are sent through it again until they fall below n
    (at most 4 times on average), which keeps it a bijection on {0 .. n-1}.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = round_keys(seed, epoch)
    value = np.asarray(index, dtype=np.uint64).copy()
    assert (value < n).all()
    pending = np.arange(value.size)
    while pending.size:
        left, right = value[pending] >> half, value[pending] & low
        for key in keys:
            left, right = right, left ^ (_mix64(right + key) & low)
        value[pending] = (left << half) | right
        pending = pending[value[pending] >= n]
    return value.astype(np.int64)


class Loader:
    """Endless training batches of one rank.

    Args:
        split: the token stream.
        context: tokens of one sequence.
        batch_size: sequences that `next` returns on each rank.
        seed: of the order.
        rank: which part of the global batch this process takes.
        world_size: how many processes share it.
        shuffle: False reads the windows in order.
    """

    def __init__(
        self,
        split: Split,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        if context < 1 or batch_size < 1:
            raise ValueError(f"context and batch_size must be at least 1, got {context=}, {batch_size=}")
        assert 0 <= rank < world_size
        self.num_windows = (split.tokens - 1) // context
        if self.num_windows < 1:
            raise ValueError(f"the split has {split.tokens} tokens, too few for one window of {context} + 1 (context)")
        self.split, self.context, self.batch_size, self.seed = split, context, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.samples = 0  # of all ranks together, since the start of the run

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets), int64 of shape (batch_size, context): the next global batch's part for this rank."""
        first = self.samples + self.rank * self.batch_size
        windows = self.windows(np.arange(first, first + self.batch_size))
        self.samples += self.batch_size * self.world_size
        tokens = np.stack([self.split.read(int(w) * self.context, self.context + 1) for w in windows])
        return tokens[:, :-1], tokens[:, 1:]

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """The window of each sample number."""
        epochs, inside = np.divmod(samples, self.num_windows)
        if not self.shuffle:
            return inside
        out = np.empty_like(inside)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(inside[here], self.num_windows, self.seed, int(epoch))
        return out

    @property
    def epoch(self) -> float:
        """Passes over the split so far."""
        return self.samples / self.num_windows

    def state(self) -> dict[str, int]:
        """All that a checkpoint needs; independent of rank, world size and batch size."""
        return {"samples": self.samples, "seed": self.seed, "context": self.context}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken, in O(1)."""
        for key in STATE_KEYS:
            if key not in state:
                raise ValueError(f"the loader state has no {key!r}, only {sorted(state)}")
        for key, own in (("seed", self.seed), ("context", self.context)):
            if state[key] != own:
                raise ValueError(f"the checkpoint read data with {key} {state[key]}, this run has {own}")
        if state["samples"] < 0:
            raise ValueError(f"the loader state has samples {state['samples']}")
        self.samples = int(state["samples"])


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def sequential_batches(
    split: Split,
    context: int,
    batch_size: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    stride: int | None = None,
    full_last: bool = False,
) -> Iterator[Batch]:
    """(inputs, targets, valid), each (B, context), over the split in order; the last batch may have fewer rows.

    Window w reads from token w * stride on. The first one predicts all its targets, every other its last `stride`, so
    each token after the first is a valid target exactly once, and beyond the first window it follows on at least
    context - stride + 1 tokens. Without a stride it is the context: windows side by side. What remains of the last
    window is padding, not valid; with full_last it begins earlier instead, where there are tokens enough.
    With max_tokens, about that many targets at most (one window at least), from windows spread evenly over the split.
    Of many processes each gets every world_size-th batch, and all equally many: one more with nothing valid in it where
    the last round does not reach.
    """
    stride = context if stride is None else stride
    assert 1 <= stride <= context
    if split.tokens < 2:
        raise ValueError(f"the split has {split.tokens} tokens; at least 2 are needed to predict one")
    total = 1 + max(0, -(-(split.tokens - 1 - context) // stride))
    count = total if max_tokens is None else min(total, max(1, max_tokens // stride))
    windows = np.arange(count) * total // count
    batches = [windows[first : first + batch_size] for first in range(0, count, batch_size)]
    missing = -len(batches) % world_size
    own = (batches + [windows[:1]] * missing)[rank::world_size]
    latest = max(0, split.tokens - 1 - context) if full_last else split.tokens
    return _batches(split, context, stride, latest, own, empty_last=rank >= world_size - missing)


def _batches(
    split: Split, context: int, stride: int, latest: int, batches: list[np.ndarray], empty_last: bool
) -> Iterator[Batch]:
    for index, rows in enumerate(batches):
        tokens = np.full((len(rows), context + 1), PAD_ID, dtype=np.int64)
        valid = np.zeros((len(rows), context), dtype=bool)
        for row, window in enumerate(rows):
            new = int(window) * stride + (context - stride if window else 0)  # the windows before end at this token
            start = min(int(window) * stride, latest)
            count = min(context + 1, split.tokens - start)
            tokens[row, :count] = split.read(start, count)
            valid[row, new - start : count - 1] = not (empty_last and index == len(batches) - 1)
        yield tokens[:, :-1], tokens[:, 1:], valid


def document_positions(inputs: np.ndarray, eot_id: int) -> np.ndarray:
    """Position ids of (..., T) tokens that restart at every end-of-text token, which opens a document at position 0.

    A window that begins inside a document counts from its own start.
    """
    positions = np.broadcast_to(np.arange(inputs.shape[-1], dtype=np.int64), inputs.shape)
    starts = np.where(inputs == eot_id, positions, 0)
    return positions - np.maximum.accumulate(starts, axis=-1)
