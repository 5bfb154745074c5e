"""What became what: the record that factorizing a model returns, and its table."""

import re
from dataclasses import asdict, dataclass
from typing import Any

FUSED = {
    "c_attn": "q, k and v",
    "qkv_proj": "q, k and v",
    "query_key_value": "q, k and v",
    "Wqkv": "q, k and v",
    "qkv": "q, k and v",
    "W_pack": "q, k and v",
    "gate_up_proj": "gate and up",
}
Row = tuple[str, str, str, str, str, str, str]


@dataclass(frozen=True)
class FactorizeEntry:
    """One matrix (or stack of expert matrices) that became factors.

    Args:
        name: full dotted name.
        kind: class of the module that held it: "Linear", "Conv1D", "MixtralExperts", ...
        d_in, d_out, rank: shape of W and inner dimension of its factors.
        stack: number of matrices of that shape (experts), else 1.
        params_before, params_after: without bias.
        warning: why this may not be what was wanted, or None.
        fused: what the projection holds if it is several in one, counted as one matrix; or None.
        kept_energy: share of ||W||_F^2 that the factors keep, where they truncate a weight.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    rank: int
    stack: int
    params_before: int
    params_after: int
    warning: str | None = None
    fused: str | None = None
    kept_energy: float | None = None

    @property
    def larger(self) -> bool:
        """Whether the factors are no smaller than the matrix."""
        return self.params_after >= self.params_before

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FactorizeReport:
    """All entries, and the parameter counts of the whole model, `params_before` and `params_after`."""

    entries: tuple[FactorizeEntry, ...]
    params_before: int
    params_after: int

    @property
    def ranks(self) -> dict[str, int]:
        """name -> rank, in model order."""
        return {e.name: e.rank for e in self.entries}

    @property
    def warnings(self) -> list[str]:
        """One line for each entry with a warning."""
        return [f"{e.name}: {e.warning}" for e in self.entries if e.warning]

    def __str__(self) -> str:
        """A table of at most 80 columns; equal matrices of repeated blocks share a row, `*` for the block number."""
        groups: dict[tuple, list[FactorizeEntry]] = {}
        for e in self.entries:
            groups.setdefault((any_block(e.name), e.d_in, e.d_out, e.rank, e.warning), []).append(e)
        lines = [_line(("matrix", "count", "d_in", "d_out", "rank", "dense", "factors"))]
        lines += [_line(_row(key[0], group)) for key, group in groups.items()]
        share = self.params_after / self.params_before
        total = f"{_short(self.params_before)} -> {_short(self.params_after)} parameters ({share:.0%})"
        lines.append(f"{sum(e.stack for e in self.entries)} matrices; whole model {total}")
        for key, (first, *_) in groups.items():
            if first.fused:
                lines.append(_note("fused", key[0], f"{first.fused} count as one matrix"))
            if first.warning:
                lines.append(_note("warning", key[0], first.warning))
        return "\n".join(lines)


def any_block(name: str) -> str:
    """The name with `*` for numbers of blocks, which repeated blocks share."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def detailed(report: FactorizeReport) -> str:
    """A table of at most 80 columns: matrices of repeated blocks share a row, with the ranges of what differs.

    Rank and kept energy of a truncation are those of each weight; `FactorizeReport.entries` has them one by one.
    """
    groups: dict[tuple[str, int, int, bool], list[FactorizeEntry]] = {}
    for e in report.entries:
        groups.setdefault((any_block(e.name), e.d_out, e.d_in, e.larger), []).append(e)
    lines = [_detail("matrix", "count", "d_out x d_in", "rank", "kept", "dense", "factors")]
    for (name, d_out, d_in, larger), group in groups.items():
        count, ranks = sum(e.stack for e in group), [e.rank for e in group]
        kept = _range([f"{e.kept_energy:.2%}" for e in sorted(group, key=_kept) if e.kept_energy is not None])
        before, after = (_short(sum(getattr(e, f"params_{when}") for e in group)) for when in ("before", "after"))
        rank = _range([str(min(ranks)), str(max(ranks))])
        mark = "!" if larger else ""
        lines.append(_detail(name, str(count), f"{d_out} x {d_in}", rank, kept, before, after, mark).rstrip())
    before, after = (sum(getattr(e, f"params_{when}") for e in report.entries) for when in ("before", "after"))
    count = sum(e.stack for e in report.entries)
    lines.append(_detail(f"{count} matrices", "", "", "", "", _short(before), _short(after)))
    fused = {e.name.rpartition(".")[2]: e.fused for e in report.entries if e.fused}
    lines += [_note("fused", name, f"{parts} count as one matrix") for name, parts in fused.items()]
    return "\n".join(lines)


def saving_warnings(report: FactorizeReport) -> list[str]:
    """A line for each weight that is zero, on matrices that are no smaller as factors, and if they are so together."""
    larger = [e for e in report.entries if e.larger]
    before, after = (sum(getattr(e, f"params_{when}") for e in report.entries) for when in ("before", "after"))
    lines = [f"{e.name}: {e.warning}" for e in report.entries if e.warning and not e.warning.startswith("rank")]
    if larger:
        lines.append(f"{len(larger)} of {len(report.entries)} (marked !) are no smaller as factors than dense")
    if after >= before:
        lines.append(f"nothing is saved: factors {_short(after)}, dense {_short(before)} parameters")
    return lines


def fused_parts(name: str) -> str | None:
    """What a fused projection holds, told by the last part of its name; None for an ordinary one."""
    return FUSED.get(name.rpartition(".")[2])


def _row(name: str, group: list[FactorizeEntry]) -> Row:
    e, count = group[0], sum(e.stack for e in group)
    before, after = sum(e.params_before for e in group), sum(e.params_after for e in group)
    return name, str(count), str(e.d_in), str(e.d_out), str(e.rank), _short(before), _short(after)


def _line(row: Row) -> str:
    name, *numbers = row
    return f"{clipped(name, 32):32}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, (6, 7, 8, 7, 10, 10), strict=True))


def _kept(entry: FactorizeEntry) -> float:
    return entry.kept_energy or 0.0


def _range(values: list[str]) -> str:
    """First to last of sorted values, once where they are equal; "" without any."""
    if not values or values[0] == values[-1]:
        return values[0] if values else ""
    return f"{values[0].removesuffix('%')}-{values[-1]}"


def _detail(name: str, count: str, shape: str, rank: str, kept: str, before: str, after: str, mark: str = "") -> str:
    cells = zip((count, shape, rank, kept, before, after), (6, 13, 10, 14, 8, 8), strict=True)
    return f"{clipped(name, 20):20}" + "".join(f"{cell:>{width}}" for cell, width in cells) + mark


def _note(what: str, name: str, text: str) -> str:
    return f"{what}: {clipped(name, max(80 - len(f'{what}: : {text}'), 16))}: {text}"


def clipped(text: str, width: int) -> str:
    """The end of a long text is what tells names apart, so the beginning goes."""
    return text if len(text) <= width else ".." + text[2 - width :]


def _short(count: int) -> str:
    """12345678 -> 12.35M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
