"""Row shards of stacks on several pretend processes in lockstep, driven as the engine drives gram rules; an oracle."""

import itertools
from dataclasses import dataclass, field

import torch
from torch.testing import assert_close

from nativerank.optim.ask import Part, packed, unpacked
from nativerank.optim.check import DEFAULTS
from nativerank.optim.directions import New, Stack, formed
from nativerank.optim.gram_rules import GRAM_RULES
from nativerank.optim.rules import MOMENT_STATES, RULES, WEIGHT_SHAPED

D_OUT, D_IN, R, N = 13, 11, 4, 3
EVEN, UNEVEN, EMPTY, MANY = (1, (1,)), (1, (7, 4, 2)), (1, (0, 9, 0, 4)), (2, (5, 8))
GRIDS = {"one": EVEN, "uneven": UNEVEN, "empty shards": EMPTY, "2 replicas x 2 shards": MANY}


def settings(rule, **changes):
    base = {**DEFAULTS, "rule": rule, "lr": 0.05, **changes}
    return {**base, "initial_lr": base["lr"]}


@dataclass
class Unit:
    """Whole stacks: tall weights (n, d, r) and an s (n, r), with their state."""

    rule: str
    options: dict
    weights: list[torch.Tensor]
    shapes: list[tuple]
    states: list[dict] = field(default_factory=list)

    def stacks(self, grads):
        several = RULES[self.rule].width > 1
        args = zip(grads, self.states, self.shapes, self.weights, strict=True)
        return [Stack(g, state, shape, w if several else None) for g, state, shape, w in args]


def unit(rule, options, dtype=torch.float64, sizes=(D_OUT, D_IN, R), n=N, seed=0, scale=1.0):
    g, kind = torch.Generator().manual_seed(seed), RULES[rule].kind
    d_out, d_in, r = sizes
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights, shapes = [scale * draw(n, d_out, r)], [(d_out, r)]
    if kind != "matrix":
        weights, shapes = [*weights, scale * draw(n, d_in, r)], [*shapes, (r, d_in)]
    if kind == "triple":
        weights = [torch.linalg.qr(w).Q for w in weights] + [scale * (0.5 + draw(n, r).abs())]
        shapes = [*shapes, (r,)]
    return started(rule, options, [w.to(dtype) for w in weights], shapes, g)


def started(rule, options, weights, shapes, g):
    """Whole stacks at step 0."""
    made, dtype = Unit(rule, options, weights, shapes), weights[0].dtype
    narrow = torch.bfloat16 if options["state_dtype"] == "bf16" else dtype
    for i, w in enumerate(weights):
        made.states.append({name: begun(name, w, g, dtype if i == 2 else narrow) for name in RULES[rule].state_of(i)})
    return made


def begun(name, w, g, kept):
    if name == "step":
        return torch.zeros(len(w))
    if name == "R":
        return torch.eye(w.shape[-1], dtype=w.dtype).repeat(len(w), 1, 1)
    if name == "power_vector":
        u = torch.randn(*w.shape[:-1], generator=g, dtype=torch.float64)
        return torch.nn.functional.normalize(u, dim=-1).to(w.dtype)
    return torch.zeros_like(w, dtype=kept)


def gradients(made, step):
    """Of a quadratic in W with its curvature, so that what a step did shows in the next."""
    g = torch.Generator().manual_seed(1000 + step)
    A = made.weights[0].double()
    if len(made.weights) == 1:
        return [(A + torch.randn(A.shape, generator=g, dtype=torch.float64)).to(made.weights[0])]
    B = made.weights[1].double()
    left = A if len(made.weights) == 2 else A * made.weights[2].double()[:, None]
    right = B if len(made.weights) == 2 else B * made.weights[2].double()[:, None]
    W = left @ B.mT
    G = W - 2 * torch.randn(W.shape, generator=g, dtype=torch.float64)
    found = [G @ right, G.mT @ left]
    if len(made.weights) == 3:
        found.append((A * (G @ B)).sum(-2))
    return [x.to(w) for x, w in zip(found, made.weights, strict=True)]


def applied(weight, change, options):
    if isinstance(change, New):
        return change.weight.to(weight)
    return weight * (1 - options["lr"] * options["weight_decay"]) - formed(change).to(weight)


def ordinary(made, grads):
    result = RULES[made.rule].update(*made.stacks(grads), made.options)
    *changes, record = result if len(made.weights) > 1 else (result, {})
    made.weights = [applied(w, c, made.options) for w, c in zip(made.weights, changes, strict=True)]
    return record


class Cluster:
    """Processes with row shards of a Unit, driven as the engine does; counts what was asked for."""

    def __init__(self, made, grid):
        self.made, (self.replicas, cuts) = made, grid
        self.splits = [self.split(w.shape[1], cuts) for w in made.weights[:2]]
        self.ranks = list(itertools.product(range(self.replicas), range(len(cuts))))
        self.asked, self.weights, self.states, self.changes = [], [], [], []
        self.small = [[self.owned(i, p) for i in range(len(made.weights))] for p in range(len(self.ranks))]
        for _, shard in self.ranks:
            self.weights.append([self.cut(w, i, shard) for i, w in enumerate(made.weights)])
            self.states.append([self.local(i, shard) for i in range(len(made.weights))])

    @staticmethod
    def split(rows, cuts):
        """Sizes in the proportions of the cuts, which add up."""
        sizes = [rows * c // sum(cuts) for c in cuts]
        sizes[-1 if cuts[-1] else 1] += rows - sum(sizes)
        return sizes

    def cut(self, x, i, shard):
        return x.clone() if i == 2 else x.split(self.splits[i], 1)[shard].clone()

    def local(self, i, shard):
        if i == 2:
            return {}
        found = {}
        for name, x in self.made.states[i].items():
            if name in WEIGHT_SHAPED or name == "power_vector":
                found[name] = self.cut(x, i, shard)
            elif name == "step":
                found[name] = x.clone()
            else:
                found["R_inverse"] = torch.linalg.inv(x)
        return found

    def mine(self, process):
        return [i for i in range(len(self.made.weights[0])) if i % len(self.ranks) == process]

    def owned(self, i, process):
        names = MOMENT_STATES if i == 2 else ("R",)
        return {k: v[self.mine(process)].clone() for k, v in self.made.states[i].items() if k in names}

    def stacks(self, process, grads):
        (_, shard), several, found = self.ranks[process], RULES[self.made.rule].width > 1, []
        for i, (w, g) in enumerate(zip(self.weights[process], grads, strict=True)):
            if i == 2:
                mask = torch.arange(w.shape[-1]) % len(self.ranks) == process
                found.append(Stack(self.cut(g, i, shard) * mask, {}, self.made.shapes[i], w * mask))
            else:
                state = self.states[process][i]
                found.append(Stack(self.cut(g, i, shard), state, self.made.shapes[i], w if several else None))
        return found

    def rows(self, process):
        replica = self.ranks[process][0]
        return lambda x: x.tensor_split(self.replicas, 1)[replica]

    def step(self, grads):
        """One step with whole gradients; every process has its rows of them."""
        rule, options = GRAM_RULES[self.made.rule], self.made.options
        running = [rule(*self.stacks(p, grads), options, self.rows(p)) for p in range(len(self.ranks))]
        asks, results = [next(run) for run in running], []
        self.asked.append([])
        while len(results) < len(running):
            self.asked[-1].append("sum" if asks[0].solve is None else "solve")
            answer = self.answer(asks)
            asks = []
            for run in running:
                try:
                    asks.append(run.send({k: v.clone() for k, v in answer.items()}))
                except StopIteration as end:
                    results.append(end.value)
        self.changes = []
        for p, result in enumerate(results):
            *changes, self.record = result if len(self.made.weights) > 1 else (result, {})
            self.changes.append(changes)
            for i, change in enumerate(changes):
                self.weights[p][i] = applied(self.weights[p][i], change, options)

    def answer(self, asks):
        kinds = [{k: (p.form, p.tensor.shape, p.tensor.dtype) for k, p in ask.parts.items()} for ask in asks]
        assert all(kind == kinds[0] for kind in kinds)
        sums = {k: sum(travelled(ask.parts[k]) for ask in asks) for k in kinds[0]}
        if asks[0].solve is None:
            return sums
        found, everyone = {}, len(self.made.weights[0])
        for p in range(len(self.ranks)):
            mine = self.mine(p)
            solved = asks[p].solve({k: v[mine] for k, v in sums.items()}, self.small[p], self.made.options)
            for k, part in solved.items():
                x = travelled(part)
                found.setdefault(k, x.new_zeros(everyone, *x.shape[1:]))[mine] = x
        return found

    def whole(self, pick):
        """Shards side by side; that replicas hold the same bits is checked."""
        n = len(self.ranks) // self.replicas
        for p in range(n, len(self.ranks)):
            assert_close(pick(p), pick(p % n), rtol=0, atol=0, equal_nan=True)
        return torch.cat([pick(p) for p in range(n)], 1)

    def weight(self, i):
        return self.weights[0][2] if i == 2 else self.whole(lambda p: self.weights[p][i])

    def change(self, i):
        """What the last step subtracts, in float64."""
        return self.whole(lambda p: formed(self.changes[p][i]).double())

    def state(self, i):
        found = {}
        for name, x in self.made.states[i].items():
            if i == 2 or name == "R":
                found[name] = x.clone()
                for p in range(len(self.ranks)):
                    found[name][self.mine(p)] = self.small[p][i][name]
            elif name == "step":
                found[name] = self.states[0][i][name]
            else:
                found[name] = self.whole(lambda p, name=name: self.states[p][i][name])
        return found


def travelled(part: Part):
    """What arrives."""
    return unpacked(packed(part), part.form).clone()


def run_both(rule, options, grid, steps, spoil=None, **how):
    """(whole stacks after the ordinary steps, processes after theirs); they must have recorded the same."""
    alone, made = unit(rule, options, **how), unit(rule, options, **how)
    cluster = Cluster(made, grid)
    for step in range(steps):
        made.weights = [cluster.weight(i) for i in range(len(made.weights))]
        grads, ours = gradients(alone, step), gradients(made, step)
        for g in (grads, ours):
            if spoil is not None:
                spoil(g, step)
        record = ordinary(alone, grads)
        cluster.step(ours)
        assert cluster.asked[-1] in (["solve"], ["sum", "solve"])
        for key, value in record.items():
            assert_close(cluster.record[key], value, rtol=1e-9, atol=1e-9, equal_nan=True)
    return alone, cluster


def compare(alone, cluster, atol=1e-9):
    """Weights and all state."""
    for i, w in enumerate(alone.weights):
        assert_close(cluster.weight(i), w, rtol=atol, atol=atol, equal_nan=True)
        for name, x in alone.states[i].items():
            assert_close(cluster.state(i)[name], x, rtol=atol, atol=atol, equal_nan=True)
