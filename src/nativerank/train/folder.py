"""The run folder: whether it may be used, and the configuration it keeps.

    config.yaml   metrics.jsonl   checkpoints/step-NNNNNN/   model/

config.yaml is the resolved configuration, below comments with versions and commit, so `--config RUN/config.yaml` makes
the same run again.
"""

from dataclasses import replace
from pathlib import Path

import yaml

from nativerank.config import RunConfig, differences, from_dict, to_dict
from nativerank.train.setup import versions

CONFIG = "config.yaml"
PARTIAL_CONFIG = f".{CONFIG}.partial"
# What may differ between a run and its continuation: none of it changes the next step's numbers, except the number
# of steps, through the schedule, which is how a finished run is extended.
FREE: tuple[str, ...] = (
    "out",
    "resume",
    "device",
    "compile",
    "track",
    "profile",
    "data.path",
    "guard",
    "train.steps",
    "train.tokens",
)
FREE += ("train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep", "train.probe_every")


def refuse_or_resume(config: RunConfig, out: Path) -> None:
    """Decides whether the run folder may be used.

    Raises:
        ValueError: it holds another run, or a run and resuming was not asked for.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; choose another --out")
    if not out.exists() or all(path.name == PARTIAL_CONFIG for path in out.iterdir()):
        if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
            raise ValueError(f"--resume {config.resume}: no such checkpoint folder")
        return
    if not (out / CONFIG).is_file():
        raise ValueError(f"{out} exists and is not a run folder; choose another --out")
    if config.resume == "never":
        raise ValueError(f"{out} already holds a run; continue it with --resume auto, or choose another --out")
    before = read_config(out)
    changed = [key for key in differences(before, config) if not key.startswith(FREE)]
    if changed:
        raise ValueError(f"{out} holds another run: {', '.join(changed)} differ; choose another --out")


def read_config(out: Path) -> RunConfig:
    """The resolved configuration that a run folder keeps.

    Raises:
        ValueError: it is damaged, or of a version with other keys.
    """
    try:
        values = yaml.safe_load((out / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no keys")
        return from_dict(RunConfig, values)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"cannot read {out / CONFIG}: {' '.join(str(error).split())}") from None


def write_config(config: RunConfig, out: Path) -> None:
    """Writes config.yaml, atomically."""
    header = "".join(f"# {name}: {value}\n" for name, value in versions().items())
    text = header + yaml.safe_dump(to_dict(replace(config, out=str(out))), sort_keys=False)
    partial = out / PARTIAL_CONFIG
    partial.write_text(text, encoding="utf-8")
    partial.replace(out / CONFIG)
