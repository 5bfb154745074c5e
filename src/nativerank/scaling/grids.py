"""Named sweeps.

| name | what | convention of its budgets |
|---|---|---|
| spectron | the Spectron paper's own: 46 runs, 47M to 1.5B parameters at ratio 0.25, 4 budgets | 6nd, total |
| miniature | dense and low rank on the built-in corpus, two cores, less than an hour | exact |
| desk | dense and low rank at three ratios up to 320M; about a day of an H100 at 40% of its peak | exact |
"""

from nativerank.config import nearest
from nativerank.experiments.arms import Arm
from nativerank.scaling.design import Design

RATIO = "rank.ratio"
DENSE = Arm("dense-muon", "dense-muon")


def low_rank(ratio: float) -> Arm:
    """Spectron at a rank ratio."""
    return Arm(f"spectron[{RATIO}={ratio:g}]", "spectron", {RATIO: ratio})


# d_model x layers x heads of the paper's scripts, 47.5M to 1495.2M parameters in low rank. They reckon with parameters
# in units of 10,000 and round to whole steps of 512 x 2048 tokens. At the last budget the two smallest have no script,
# as if 1,200 tokens per parameter were the limit. The paper fits 39 of the runs; which ones is not known.
SHAPES = (
    "512x8x8",
    "640x10x10",
    "768x12x12",
    "768x14x12",
    "896x16x14",
    "1024x20x16",
    "1280x20x20",
    "1536x24x24",
    "1536x26x24",
    "2048x24x16",
    "2048x30x16",
    "2560x32x20",
)

SMALL = ("32x1x2", "48x2x3", "64x2x4", "80x3x5", "96x3x6", "128x4x8", "160x5x10")

MIDDLE = ("256x4x4", "320x5x5", "384x6x6", "448x7x7", "512x8x8", "640x10x10", "768x12x12", "896x16x14", "1024x20x16")

GRIDS: dict[str, Design] = {
    "spectron": Design(
        sizes=tuple(f"spectron-s@{shape}" for shape in SHAPES),
        budgets=(2.2e18, 5.57e18, 1.41e19, 3.57e19),
        arms=(low_rank(0.25),),
        tokens_per_param=(0.0, 1200.0),
        common={"optim.final_lr": 0.0, "rank.rule": "code"},
        params_unit=1e4,
    ),
    "miniature": Design(
        sizes=tuple(f"pocket@{shape}" for shape in SMALL),
        budgets=(1e12, 3e12, 9e12),
        arms=(DENSE, low_rank(0.25)),
        convention="exact",
        tokens_per_param=(0.3, 90.0),
    ),
    "desk": Design(
        sizes=tuple(f"spectron-s@{shape}" for shape in MIDDLE),
        budgets=(1e17, 3e17, 9e17),
        arms=(DENSE, low_rank(0.125), low_rank(0.25), low_rank(0.5)),
        convention="exact",
        tokens_per_param=(1.0, 150.0),
    ),
}


def find_grid(name: str) -> Design:
    """The named sweep.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r}{nearest(name, GRIDS)} (grids: {', '.join(GRIDS)})")
    return GRIDS[name]
