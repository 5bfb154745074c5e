"""Optimizer state of a factor whose columns became others: G -> G T for its gradients (`linalg.resize`).

    momentum, exp_avg   averages of gradients, so M T: exact
    exp_avg_sq          the same columns where T selects; where it mixes them, what the other factor says: G_A = G B, so
                        if the entries of G in a row have one variance and no correlation, v_ij = var_i |b_j|^2, and
                        v' = (sum_j v_ij / ||B||_F^2) |b'_k|^2. A new column gets the mean of its row: from zeros, with
                        an old step count, Adam would take steps of up to (1 - beta1) / sqrt(1 - beta2) times the rate,
                        and worse after that. New columns of frames do start from zeros, since a leap of theirs moves
                        nothing, and with the others' moments they would never catch up: their gradients are
                        proportional to an s that begins at 0.
    R                   of A = Q R in `tsvd`, where T selects: its rows and columns, triangular again, and a unit
                        diagonal for new columns. Moments are those of A there: M R^T T R'^-T
    power_vector        the leading left singular vector, where it moved
    step                stays

A momentum whose new columns are zero stays zero there when it is orthogonalized: M q(M^T M) cannot reach them.
"""

import torch
from torch import Tensor

from nativerank.linalg.resize import Resized

State = dict[str, Tensor]


def resized_state(state: State, change: Resized) -> State:
    """The same state for the resized parameter, in new tensors.

    Raises:
        ValueError: a tensor of which nothing is known.
    """
    T, found = change.T, State()
    for name in sorted(state, key="R".__eq__, reverse=True):  # on which moments rely
        value = state[name]
        tall = value.mT if change.down and name in ("momentum", "exp_avg", "exp_avg_sq") else value
        if name in ("momentum", "exp_avg"):
            new = in_raw_coordinates(tall, state["R"], T, found["R"]) if "R" in state else tall.to(T) @ T
        elif name == "exp_avg_sq":
            new = second_moment(tall, change)
        elif name == "R":
            new = T.mT @ value.to(T) @ T + torch.diag_embed(fresh(T).squeeze(-2).to(T))
        elif name == "power_vector":
            new = value.clone() if change.top is None else change.top
        elif name == "step":
            new = value.clone()
        else:
            raise ValueError(f"nobody has said what becomes of the optimizer state {name!r} at another rank")
        found[name] = (new.mT if tall is not value else new).to(value).contiguous()
    return {name: found[name] for name in state}


def second_moment(v: Tensor, change: Resized) -> Tensor:
    """v' of v (..., d, r) or (r)."""
    T, mean = change.T, v.to(change.T).mean(-1, keepdim=True)
    if change.partner is None:
        new = fresh(T) if v.dim() > 1 else fresh(T).squeeze(-2)
        return v.to(T) @ T + (0.0 if change.free else mean * new)
    before, after = (squares.to(T) for squares in change.partner)
    size = before.mean(-1, keepdim=True)  # of an average column, in the place of one that is zero
    return mean / size[..., None, :] * torch.where(after > 0, after, size)[..., None, :]


def in_raw_coordinates(M: Tensor, R: Tensor, T: Tensor, new_R: Tensor) -> Tensor:
    """M R^T T R'^-T: an average of gradients of A = Q R (..., d, r), by way of those of Q."""
    along_Q = M.to(T) @ R.to(T).mT @ T
    return torch.linalg.solve_triangular(new_R.to(T).mT, along_Q, upper=False, left=False)


def fresh(T: Tensor) -> Tensor:
    """Which columns (..., 1, r') are new."""
    return (T == 0).all(-2, keepdim=True)
