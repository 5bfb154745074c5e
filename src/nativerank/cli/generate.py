"""nativerank generate: continue prompts with a run, a checkpoint or a saved model folder."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from nativerank.cli.console import progress
from nativerank.cli.flags import add_device, add_quantize, add_step, device_of
from nativerank.cli.output import add_json, check_json, write_json

EXAMPLE = """The text goes to standard output, token by token where one is written at a time; the form and the speed go
to standard error.

--form merged forms W = A B^T in memory first, --form factored keeps the factors. auto takes the form that is done
first by the measurements of `nativerank bench generate` in the user cache, if there is one of this machine and
number of threads for a model of similar size and rank, at the nearest batch, the seconds that merging takes included.
Without one it counts: reading weights is what a token costs, so factors win below the break-even rank.

examples:
  nativerank generate runs/demo-spectron --prompt "My fellow citizens" --max_new_tokens 80
  nativerank generate runs/demo-spectron --step 200 --prompt "The war" --temperature 0
  nativerank generate runs/demo-spectron --prompts prompts.jsonl --batch_size 16 --json texts.json
  nativerank generate runs/demo-spectron/model --prompts - --top_p 0.9 --num 3
"""
# What a terminal would act on instead of showing it.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank generate`."""
    parser = subparsers.add_parser(
        "generate",
        description="Continue prompts with a trained model.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="RUN|DIR", help="run, checkpoint, or folder of a model and its tokenizer")
    add_step(parser)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="to continue; may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help='one prompt a line, or .jsonl with "prompt" keys; - for standard input'
    )
    parser.add_argument("--num", type=int, default=1, metavar="N", help="texts per prompt, with seeds that count up")
    parser.add_argument("--max_new_tokens", type=int, default=60, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, metavar="K", help="draw among this many tokens, 0 for all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens of this probability"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="texts at a time; 1 streams each")
    parser.add_argument("--form", default="auto", choices=["auto", "factored", "merged"], help="see below")
    add_quantize(parser)
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="the text alone")
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Prints prompts and continuations, or writes them as JSON."""
    from nativerank.hub.sampling import Sampling

    check_json(flags.json)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: getattr(flags, name) for name in names})
    if flags.batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {flags.batch_size}")
    sampling.check_num(flags.num)
    device, prompts = device_of(flags), prompts_of(flags)
    writer, requests, facts = prepare(flags, sampling, prompts, device)
    began = time.perf_counter()
    texts = write_texts(writer, requests, flags.batch_size, flags.json is None, flags.quiet)
    seconds = time.perf_counter() - began
    tokens = sum(text.tokens for text in texts)
    facts |= {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    aside(flags, f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:,.1f} tokens/s")
    write_json({**facts, "texts": [asdict(text) for text in texts]}, flags.json)
    return 0


def aside(flags: argparse.Namespace, line: str) -> None:
    """A line beside the text."""
    if not flags.quiet:
        print(line, file=sys.stderr, flush=True)


def prompts_of(flags: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file; an empty one where there are none."""
    from nativerank.data.prompts import read_prompts

    return [*(flags.prompt or []), *(read_prompts(flags.prompts) if flags.prompts else [])] or [""]


def prepare(flags: argparse.Namespace, sampling: Any, prompts: list[str], device: Any) -> tuple[Any, Any, Any]:
    """The model in its form on its device, what it is to write, and facts for the record."""
    from nativerank.hub.forms import Work, take_form
    from nativerank.hub.generate import Writer
    from nativerank.models import end_of_text
    from nativerank.train.trained import open_trained

    trained = open_trained(flags.model, flags.step)
    if trained.tokenizer is None:
        raise ValueError(f"{trained.label} has no tokenizer, so there is no way to read the prompt")
    writer = Writer(trained.model, trained.tokenizer, end_of_text(trained.model, trained.tokenizer), sampling)
    requests = writer.requests(prompts, flags.num)
    batch, least = min(flags.batch_size, len(requests)), min(r.room for r in requests)
    if least < flags.max_new_tokens:
        aside(flags, f"the context leaves room for {least} of {flags.max_new_tokens} new tokens")
    work = Work(batch, max(len(r.ids) for r in requests), max(r.room for r in requests))
    choice = take_form(trained.model, flags.form, work, device)
    trained.model.to(device)
    aside(flags, f"{trained.label}, {choice.form}: {choice.reason}")
    if flags.quantize:
        from nativerank.integrations.quantize import quantize

        aside(flags, str(quantize(trained.model, flags.quantize)))
    facts = {"model": str(flags.model), "label": trained.label, "form": choice.form, "reason": choice.reason}
    return writer, requests, facts | {"quantize": flags.quantize, "device": str(device), "batch_size": batch}


def write_texts(writer: Any, requests: Any, batch_size: int, show: bool, quiet: bool) -> list[Any]:
    """All continuations; shown with their prompts and a blank line between, and streamed where one is written alone."""
    if not show:
        with progress(quiet) as watch:
            return list(counted(writer.write_all(requests, batch_size), len(requests), watch))
    show_text = printer()
    made: list[Any] = []
    if min(batch_size, len(requests)) == 1:
        for request in requests:
            show_text(("\n" if made else "") + request.prompt)
            made += writer.write([request], stream=show_text)
            show_text("\n")
        return made
    for text in writer.write_all(requests, batch_size):
        show_text(("\n" if made else "") + f"{text.prompt}{text.text}\n")
        made.append(text)
    return made


def counted(texts: Iterable[Any], total: int, watch: Callable[..., None]) -> Iterator[Any]:
    """The texts, each told of when it is there."""
    for done, text in enumerate(texts, 1):
        watch("texts", done, total)
        yield text


def printer() -> Callable[[str], None]:
    """Prints at once; never fails on a character, and keeps what would act on a terminal from it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a locale without it
    shown = CONTROLS if sys.stdout.isatty() else {}

    def show(text: str) -> None:
        sys.stdout.write(text.translate(shown))
        sys.stdout.flush()

    return show
