"""config.yaml of a run folder, the configuration that a run was made by; to be read without torch."""

from pathlib import Path

import yaml

from nativerank.config import RunConfig, from_dict

CONFIG = "config.yaml"


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
