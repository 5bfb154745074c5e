"""nativerank generate: continue a prompt with a trained run or a saved model folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nativerank.cli.output import add_json, check_json, write_json

EXAMPLE = """example:
  nativerank generate runs/demo-spectron --prompt "My fellow citizens" --max_new_tokens 80
"""


def add_parser(subparsers: Any) -> None:
    """Flags of `nativerank generate`."""
    parser = subparsers.add_parser(
        "generate",
        description="Continue a prompt with a trained model.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="run folder, or a folder with config.json, model.safetensors and tokenizer.json")
    parser.add_argument("--prompt", default="", help="text to continue (default: start a new document)")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="sample among this many tokens, 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Prints prompt and continuation."""
    from nativerank.data.tokenizer import load_tokenizer
    from nativerank.hub.generate import end_of_text, generate
    from nativerank.hub.load import TOKENIZER, load, model_folder

    check_json(flags.json)
    folder = model_folder(Path(flags.model))
    if not (folder / TOKENIZER).exists():
        raise ValueError(f"{folder} holds no {TOKENIZER}, so there is no way to read the prompt")
    tokenizer = load_tokenizer(folder / TOKENIZER)
    model = load(folder)
    text = generate(
        model,
        tokenizer,
        flags.prompt,
        eot_id=end_of_text(model, tokenizer),
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        seed=flags.seed,
    )
    write_json({"prompt": flags.prompt, "text": text}, flags.json)
    if flags.json is None:
        sys.stdout.write(f"{flags.prompt}{text}\n")
    return 0
