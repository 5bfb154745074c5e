"""A profile of a run on two processes: the first one's step, with what it exchanges."""

import json

import pytest
from training_runs import DDP, FSDP

from nativerank.train.parts import DOWN, UP


@pytest.mark.slow
@pytest.mark.parametrize("where", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_the_first_process_writes_its_table(train_on, where):
    run = train_on(2, "run", method="spectron", profile=True, train__steps=10, train__recompute="up", **where)
    found = json.loads((run / "profile/parts.json").read_text())
    rows = {row["part"]: row for row in found["parts"]}
    assert sorted(file.name for file in (run / "profile").iterdir()) == [
        "parts.json",
        "parts.txt",
        "table.txt",
        "trace.json",
    ]
    assert {DOWN, UP, "clip", "optimizer: orthogonalize", "exchange between processes"} <= set(rows)
    assert found["tokens"] * 2 == 2 * 16 * 1 and rows[UP]["milliseconds"]["again"] > 0
    assert sum(row["total_milliseconds"] for row in rows.values()) == pytest.approx(found["step_milliseconds"], rel=0.1)
