"""Nothing of a step is read by the host, unless its rule says so; and so a CUDA graph may hold one."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nativerank.linalg.gram import full_precision
from nativerank.optim.check import DEFAULTS
from nativerank.optim.optimizer import LowRankOptimizer
from nativerank.optim.rules import RULES, why_host_waits

FREE = {
    "adamw": {},
    "muon": {},
    "spectron": {},
    "spectron, polar express": {"orthogonalizer": "polar-express", "orthogonalizer_steps": 7, "nesterov": True},
    "spectron, root": {"step": "root", "weight_decay": 0.1},
    "spectron, rho fixed": {"renormalize": False},
    "spectron, narrow": {"state_dtype": "bf16"},
    "adam-muon": {},
}
WAITING = {
    "sct": {},
    "sct, every other": {"retract_every": 2},
    "tsvd": {},
    "stiefel-spectron": {"retraction": "polar"},
    "stiefel-spectron, certified": {"certified": True},
    "frame-spectron": {},
}
EIGENVALUES = {"spectron, exact": {"norm": "exact"}, "spectron, certified": {"certified": True}}
READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class NoReading(TorchDispatchMode):
    """Refuses what hands a value to the host; keeps the dtypes that products are made in."""

    def __init__(self):
        super().__init__()
        self.product_dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in READS, f"{func} reads a value"
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm, torch.ops.aten.baddbmm):
            self.product_dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def problem(case, options, device="cpu", dtype=torch.float32, lr=0.1):
    """An optimizer over six matrices of two shapes, with gradients."""
    rule, g = case.split(",")[0], torch.Generator().manual_seed(0)
    shapes = []
    for d in (12, 12, 20):
        shapes += [(d, 4), (4, 8)] + ([(4,)] if RULES[rule].kind == "triple" else [])
    draw = lambda shape: torch.randn(shape, generator=g).to(device, dtype)  # noqa: E731
    params = [nn.Parameter(draw(shape)) for shape in shapes]
    for p in params:
        p.grad = draw(p.shape)
    return LowRankOptimizer([{"params": params, "rule": rule, "lr": lr, **options}]), params


def as_on_a_gpu(monkeypatch):
    """Questions that cost nothing on a CPU are not asked."""
    for module in ("gram", "roots", "retract"):
        monkeypatch.setattr(import_module(f"nativerank.linalg.{module}"), "asks_for_free", lambda X: False)


@pytest.mark.parametrize("case", FREE)
def test_a_step_reads_nothing(case, monkeypatch):
    as_on_a_gpu(monkeypatch)
    optimizer, params = problem(case, FREE[case])
    optimizer.step()
    params[-1].grad = None  # and one with a gap in a stack
    optimizer.step()
    with NoReading():
        optimizer.step()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.set_rate(0.5)
        optimizer.step()


@pytest.mark.parametrize("case", WAITING)
def test_where_a_step_reads_its_rule_says_so(case):
    optimizer, _ = problem(case, WAITING[case])
    optimizer.step()
    with pytest.raises(AssertionError, match="reads a value"), NoReading():
        optimizer.step()


@pytest.mark.parametrize("case", {**FREE, **WAITING, **EIGENVALUES})
def test_what_waits_is_known_and_is_not_captured(case):
    options = {**FREE, **WAITING, **EIGENVALUES}[case]
    assert (why_host_waits(case.split(",")[0], {**DEFAULTS, **options}) is None) == (case in FREE)
    optimizer, _ = problem(case, options)
    if case not in FREE:
        with pytest.raises(ValueError, match=rf"a step of {case.split(',')[0]} cannot be captured: "):
            optimizer.make_capturable()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rule": "sct"}, "frames"),
        ({"rule": "spectron", "norm": "exact"}, "norm exact"),
        ({"rule": "spectron", "certified": True}, "certified asks"),
        ({"rule": "adamw-capped", "update_cap": 0.5}, "update_cap 0.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_gives_its_reason_and_changes_nothing(options, reason):
    groups = [{"params": [nn.Parameter(torch.ones(4))], "rule": "adamw", "lr": 0.1}]
    _, params = problem("sct" if options["rule"] == "sct" else "spectron", {})
    optimizer = LowRankOptimizer([*groups, {"params": params, "lr": 0.2, **options}])
    with pytest.raises(ValueError, match=f"cannot be captured: .*{reason}"):
        optimizer.make_capturable()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)


def test_a_state_dict_of_a_capturable_optimizer_is_an_ordinary_one():
    optimizer, _ = problem("spectron", {})
    optimizer.make_capturable()
    optimizer.set_rate(0.5)
    optimizer.step()
    other, _ = problem("spectron", {})
    other.load_state_dict(optimizer.state_dict())
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    lr = other.param_groups[0]["lr"]
    assert type(lr) is float and lr == pytest.approx(0.05)
    other.set_rate(1.0)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)


def test_guides_and_layerwise_updates_are_not_captured():
    optimizer, _ = problem("spectron", {})
    optimizer.update_layerwise()
    with pytest.raises(ValueError, match=r"^a step with layer-wise updates cannot be captured"):
        optimizer.make_capturable()


@pytest.mark.parametrize("case", FREE)
def test_a_rate_on_the_device_is_the_rate(case):
    found = []
    for capturable in (False, True):
        optimizer, params = problem(case, FREE[case])
        if capturable:
            optimizer.make_capturable()
        held = optimizer.param_groups[0]["lr"]
        for share in (0.5, 1.0, 0.1):
            optimizer.set_rate(share)
            optimizer.step()
        assert not capturable or optimizer.param_groups[0]["lr"] is held
        found.append([p.detach() for p in params])
    assert_close(*found)


@pytest.mark.parametrize("case", {**FREE, **WAITING, **EIGENVALUES})
def test_a_step_without_values_is_made_too(case):
    """And leaves nothing behind that the next step with values would take for its own."""
    options = {**FREE, **WAITING, **EIGENVALUES}[case]
    with FakeTensorMode():
        optimizer, params = problem(case, options)
        optimizer.step()
        params[-1].grad = None
        optimizer.step()
    optimizer, params = problem(case, options)
    params[-1].grad = None
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("case", ["muon", "spectron", "spectron, polar express", "adam-muon"])
def test_bfloat16_parameters_are_updated_through_float32_products(case):
    narrow, params = problem(case, FREE[case], dtype=torch.bfloat16)
    wide_params = [nn.Parameter(p.detach().float()) for p in params]
    for p, q in zip(wide_params, params, strict=True):
        p.grad = q.grad.float()
    rule = {"rule": case.split(",")[0], "lr": 0.1, **FREE[case]}
    wide = LowRankOptimizer([{"params": wide_params, **rule}])
    if "power_vector" in narrow.state[params[0]]:
        for p, q in zip(wide_params, params, strict=True):
            wide.state[p]["power_vector"].copy_(narrow.state[q]["power_vector"])
    wide.step()
    with NoReading() as seen:
        narrow.step()
    assert seen.product_dtypes == {torch.float32}
    # Half of the last of 8 bits for D, its subtraction, and a momentum that is kept as narrow as the parameter.
    assert_close([p.float() for p in params], [p.detach() for p in wide_params], rtol=2**-7, atol=2**-9)


def test_tf32_is_off_inside_and_as_it_was_outside():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cuda")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@needs_cuda
@pytest.mark.parametrize("case", FREE)
def test_the_host_does_not_wait_for_a_gpu(case):
    optimizer, _ = problem(case, FREE[case], "cuda")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("case", FREE)
def test_a_captured_step_follows_the_schedule(case):
    eager, expected = problem(case, FREE[case], "cuda")
    optimizer, params = problem(case, FREE[case], "cuda")
    optimizer.make_capturable()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()  # a graph wants kernels and workspaces that exist
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    eager.step()
    for share in (0.5, 0.1):
        for p, q in zip(params, expected, strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        optimizer.set_rate(share)
        eager.set_rate(share)
        graph.replay()
        eager.step()
    assert_close([p.detach() for p in params], [p.detach() for p in expected])
