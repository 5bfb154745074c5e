"""Documents to tokens, on one process or many, with the same result to the byte.

Batches go round-robin to the workers, one in flight for each, and come back in the order they were sent. The split of a
document is decided from its text alone, so neither order nor workers matter to it.
"""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nativerank.data.shards import SPLITS, token_dtype
from nativerank.data.tokenizer import encode_batch, plain_text_only

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 4096


class Encoded(NamedTuple):
    """What one batch adds to one split."""

    tokens: np.ndarray
    documents: int
    text_bytes: int


def document_draws(text: str, seed: int) -> tuple[float, float]:
    """Two independent numbers in [0, 1) from (seed, text): which split it is in, and whether a sample takes it."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16, key=str(seed).encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "big") / (1 << 64) for i in (0, 8))  # type: ignore[return-value]


@dataclass(frozen=True)
class Encoder:
    """Turns a batch of documents into tokens per split.

    Args:
        tokenizer: JSON of the tokenizer.
        vocab_size: of the tokenizer.
        eot_id: written before each document.
        seed: of the split.
        threshold: documents whose first draw is below it are validation documents.
    """

    tokenizer: str
    vocab_size: int
    eot_id: int
    seed: int
    threshold: float

    def stream(self, batches: Iterable[list[str]]) -> Iterator[dict[str, Encoded]]:
        """The batches encoded one by one, in this process."""
        tokenizer = plain_text_only(Tokenizer.from_str(self.tokenizer))
        for batch in batches:
            yield self._encode(tokenizer, batch)

    def _encode(self, tokenizer: Tokenizer, batch: list[str]) -> dict[str, Encoded]:
        groups: dict[str, list[str]] = {name: [] for name in SPLITS}
        for text in batch:
            groups["val" if document_draws(text, self.seed)[0] < self.threshold else "train"].append(text)
        return {name: self._join(tokenizer, texts) for name, texts in groups.items()}

    def _join(self, tokenizer: Tokenizer, texts: list[str]) -> Encoded:
        """EOT doc EOT doc ..."""
        dtype = token_dtype(self.vocab_size)
        pieces = [np.array([self.eot_id, *ids], dtype=dtype) for ids in encode_batch(tokenizer, texts)]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)
        return Encoded(tokens, len(texts), sum(len(text.encode("utf-8")) for text in texts))


def batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents to about BATCH_BYTES (in characters), a long document alone."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(documents: Iterable[str], encoder: Encoder, workers: int) -> Iterator[dict[str, Encoded]]:
    """Every batch of the documents, encoded, in order."""
    if workers > 1:
        return _on_workers(batched(documents), encoder, workers)
    return encoder.stream(batched(documents))


def _on_workers(batches: Iterator[list[str]], encoder: Encoder, workers: int) -> Iterator[dict[str, Encoded]]:
    with ExitStack() as stack:
        pool = [stack.enter_context(Worker(encoder)) for _ in range(workers)]
        sent = received = 0
        for batch in batches:
            if sent - received == workers:  # the oldest batch is with the very worker whose turn it is
                yield pool[received % workers].receive()
                received += 1
            # That worker waits for input now, so this cannot lock up however large the batch is.
            pool[sent % workers].send(batch)
            sent += 1
        for number in range(received, sent):
            yield pool[number % workers].receive()


class Worker:
    """A process that encodes what it is sent. It ends when its input does, so also when this process is killed.

    A plain child with pipes instead of `multiprocessing`: forking a process with threads can hang, and the other start
    methods run the user's main script again, which torch makes slow and a missing __main__ guard makes impossible.
    """

    def __init__(self, encoder: Encoder):
        paths = os.pathsep.join(path for path in sys.path if path)
        # -P: a tokenizers.py or numpy.py in the user's folder must not be imported. The processes are the
        # parallelism here; threads of the library inside each would only compete.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.send(encoder)

    def send(self, message: Any) -> None:
        """Hands over the encoder, later a batch."""
        with self._alive():
            pickle.dump(message, self.stdin, pickle.HIGHEST_PROTOCOL)
            self.stdin.flush()

    def receive(self) -> dict[str, Encoded]:
        """Waits for the result of the oldest batch."""
        with self._alive():
            return pickle.load(self.stdout)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, pickle.UnpicklingError, BrokenPipeError):
            raise ValueError("a worker process died (out of memory?); try again with fewer workers") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.process.wait()


def serve() -> None:
    """The worker's life: an encoder and then batches on standard input, results on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not mix with the replies
    encoder: Encoder = pickle.load(sys.stdin.buffer)

    def batches() -> Iterator[list[str]]:
        while True:
            try:
                yield pickle.load(sys.stdin.buffer)
            except (EOFError, pickle.UnpicklingError):  # the end, or half a batch: the parent is gone
                return

    try:
        for result in encoder.stream(batches()):
            pickle.dump(result, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
    except BrokenPipeError:  # the parent is gone
        os._exit(1)  # without flushing into the closed pipe again
