"""nativerank: pretrain language models natively in low rank.

Every weight matrix but embeddings, head and norms lives as thin factors from the first step to inference.

    import nativerank as nr

    model = AutoModelForCausalLM.from_config(config)
    nr.factorize(model, method="spectron", rank_ratio=0.25)
    optimizer = nr.build_optimizer(model, method="spectron", lr=0.02, aux_lr=3e-3)

Names are imported when they are first used, so that the command line's --help does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nativerank.version import __version__

if TYPE_CHECKING:
    from nativerank import layers, linalg
    from nativerank.hub.load import load
    from nativerank.hub.register import register
    from nativerank.hub.save import save
    from nativerank.layers.factorize import to_dense_modules
    from nativerank.layers.shared import join_products
    from nativerank.methods import build_optimizer, factorize
    from nativerank.rank.follow import follow_checkpoints

HOMES = {
    "build_optimizer": "nativerank.methods",
    "factorize": "nativerank.methods",
    "follow_checkpoints": "nativerank.rank.follow",
    "join_products": "nativerank.layers.shared",
    "load": "nativerank.hub.load",
    "register": "nativerank.hub.register",
    "save": "nativerank.hub.save",
    "to_dense_modules": "nativerank.layers.factorize",
}
ROOMS = ("layers", "linalg")

__all__ = [
    "__version__",
    "build_optimizer",
    "factorize",
    "follow_checkpoints",
    "join_products",
    "layers",
    "linalg",
    "load",
    "register",
    "save",
    "to_dense_modules",
]


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return importlib.import_module(f"nativerank.{name}")
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'nativerank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
