"""Packages that only some commands need: one sentence for all that are missing."""

import importlib
from typing import Any


def require(module: str, extra: str, what: str) -> Any:
    """The imported module.

    Args:
        module: to import, such as "lm_eval".
        extra: of nativerank, that installs it.
        what: needs it, in the user's words.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # it is there, and lacks something itself
        raise ValueError(f"{what} needs the extra `{extra}`: pip install 'nativerank[{extra}]'") from None
