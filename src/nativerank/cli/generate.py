"""nativerank generate: continue a prompt with a trained run or a saved model folder."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the result as JSON, to FILE or stdout")
    parser.set_defaults(run=run)


def run(flags: argparse.Namespace) -> int:
    """Prints prompt and continuation."""
    from nativerank.data.tokenizer import load_tokenizer
    from nativerank.hub.generate import end_of_text, generate
    from nativerank.hub.load import TOKENIZER, load, model_folder

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
    result = {"prompt": flags.prompt, "text": text}
    if flags.json and flags.json != "-":
        Path(flags.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif flags.json:
        print(json.dumps(result, indent=1))
    else:
        sys.stdout.write(f"{flags.prompt}{text}\n")
    return 0
