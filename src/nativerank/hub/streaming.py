"""Text while it is written, in pieces that add up to the text at the end.

A token may hold a part of a character (byte-level BPE cuts where it likes) or lose its space when it stands alone
(SentencePiece), so tokens are never decoded one by one: everything so far is decoded each time, and what is new is
passed on up to the first character that is not whole yet. Only where a decoder takes back what it said before
(it replaces what two tokens make together) do the pieces differ from the text: what it took back has been written.
"""

from collections.abc import Callable, Collection, Sequence
from os.path import commonprefix

from tokenizers import Tokenizer
from torch import Tensor

PARTIAL = "\ufffd"  # what an incomplete character decodes to


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text that `new_ids` add to that of `prompt_ids`, special tokens left out."""
    return continued(tokenizer, prompt_ids, tokenizer.decode(list(prompt_ids)), new_ids)


def continued(tokenizer: Tokenizer, prompt_ids: Sequence[int], before: str, new_ids: Sequence[int]) -> str:
    """`continuation` where the text of the prompt, `before`, is at hand."""
    whole = tokenizer.decode([*prompt_ids, *new_ids])
    return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(list(new_ids))


class TextStream:
    """A streamer for transformers' generate, of the kind of its BaseStreamer, for one sequence.

    Args:
        tokenizer: of the model.
        prompt_ids: what the text continues.
        stops: ids that end it.
        write: is called with every new piece of text, never an empty one.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Collection[int], write: Callable[[str], None]
    ):
        self.tokenizer, self.prompt_ids, self.stops, self.write = tokenizer, list(prompt_ids), stops, write
        self.before = tokenizer.decode(self.prompt_ids)
        self.ids: list[int] = []
        self.written, self.begun = "", False

    def put(self, value: Tensor) -> None:
        """Takes the prompt (1, n) first, which is passed over, then each new token (1,)."""
        if not self.begun:
            self.begun = True
            return
        self.ids += [i for i in value.flatten().tolist() if i not in self.stops]
        self._pass_on(self._text().rstrip(PARTIAL))

    def end(self) -> None:
        """Passes on what was held back, whole characters or not, from where it differs from what was written."""
        text = self._text()
        if rest := text[len(commonprefix([text, self.written])) :]:  # noqa: RUF071  # characters are meant
            self.write(rest)
            self.written = text

    def _text(self) -> str:
        return continued(self.tokenizer, self.prompt_ids, self.before, self.ids)

    def _pass_on(self, text: str) -> None:
        # A decoder that changes what it said before waits until it agrees again.
        if len(text) > len(self.written) and text.startswith(self.written):
            self.write(text[len(self.written) :])
            self.written = text
