"""What counts as a hidden matrix, what names mean, and every way to ask for something that is not there."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nativerank.layers.discover import linear_modules, matrix_parameters
from nativerank.layers.factorize import factorize_modules, to_dense_modules
from nativerank.layers.initialize import dense_init
from nativerank.layers.patterns import matches


class Net(nn.Module):
    """No Hugging Face model: one shared module, one tied pair, one embedding tied to a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.tied = nn.Linear(16, 16)
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.tied.weight
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.again(self.first(self.embed(ids)).tanh())
        return self.head(self.twin(self.tied(x).tanh()))


def ids():
    return torch.arange(6)


@pytest.mark.parametrize(
    "pattern, name, fits",
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.mlp.*", "model.layers.3.mlp.up_proj", True),
        ("layers.0.*", "model.layers.0.mlp.up_proj", True),
        ("layers.0.*", "model.layers.10.mlp.up_proj", False),
        ("proj", "model.layers.0.mlp.up_proj", False),
        ("mlp", "model.layers.0.mlp.up_proj", False),
        ("*_proj", "up_proj", True),
    ],
)
def test_patterns_fit_whole_names_or_dotted_suffixes(pattern, name, fits):
    assert matches(pattern, name) == fits


def test_shared_modules_are_replaced_once_everywhere_and_ties_stay_ties():
    torch.manual_seed(0)
    net = Net()
    keys, expected, first = list(net.state_dict()), net(ids()), net.first
    report = factorize_modules(net, value=16)
    assert list(report.ranks) == ["first", "tied"]
    assert net.first is net.again
    assert net.tied is not net.twin
    assert net.tied.up.weight is net.twin.up.weight and net.tied.down.weight is net.twin.down.weight
    assert net.tied.up.bias is not net.twin.up.bias
    assert type(net.head) is nn.Linear and net.head.weight is net.embed.weight
    assert_close(net(ids()), expected)
    assert to_dense_modules(net) == ["first", "tied", "twin"]
    assert net.first is net.again is first and net.tied.weight is net.twin.weight
    assert list(net.state_dict()) == keys
    assert_close(net(ids()), expected)


def test_every_linear_of_another_module_counts():
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.ModuleDict({"out": nn.Linear(32, 8)})["out"])
    assert list(factorize_modules(net, ratio=0.25).ranks.items()) == [("0", 2), ("2", 2)]


def test_dense_matrices_by_parameter_name(build):
    mixtral = build("mixtral")
    names = matrix_parameters(mixtral)
    assert "model.layers.0.mlp.experts.gate_up_proj" in names and "model.layers.1.self_attn.o_proj.weight" in names
    assert set(names) <= {n for n, _ in mixtral.named_parameters()} and len(names) == 12
    assert not any("lm_head" in n or "embed" in n or "norm" in n or "gate.weight" in n for n in names)
    assert "transformer.h.0.attn.c_attn.weight" in matrix_parameters(build("gpt2"))
    assert matrix_parameters(Net()) == ["first.weight", "tied.weight"]


def test_factors_are_not_matrices(build):
    model = build("llama")
    factorize_modules(model, include="q_proj")
    assert not any("q_proj" in name for name in linear_modules(model)) and len(linear_modules(model)) == 12
    report = factorize_modules(model)  # a second call takes the rest
    assert len(report.entries) == 12
    with pytest.raises(ValueError, match="no dense linear layer to factorize in LlamaForCausalLM"):
        factorize_modules(model)


def test_a_matrix_knows_its_shape_whatever_the_storage(build):
    c_attn = linear_modules(build("gpt2"))["transformer.h.0.attn.c_attn"]
    assert (c_attn.d_in, c_attn.d_out, c_attn.stack) == (32, 96, 1) and c_attn.weight.shape == (96, 32)
    experts = linear_modules(build("mixtral"))["model.layers.0.mlp.experts.down_proj"]
    assert (experts.d_in, experts.d_out, experts.stack) == (48, 32, 4) and experts.weight.shape == (4, 32, 48)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_dense_and_low_rank_runs_start_from_the_same_matrices(family, build):
    matrices = linear_modules(build(family))
    for name, matrix in matrices.items():
        matrix.init_dense(0.05, seed=4)
        first = matrix.weight[0] if matrix.stack > 1 else matrix.weight
        expected = dense_init(f"{name}.0" if matrix.stack > 1 else name, matrix.d_out, matrix.d_in, 0.05, 4)
        assert torch.equal(first, expected)


def test_a_full_name_means_that_weight_alone():
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    assert list(linear_modules(net, include="0")) == ["0"]
    assert list(linear_modules(net, include=["1.0"])) == ["1.0"]
    assert list(linear_modules(net, include="*0")) == ["0", "1.0"]


def test_ranks_of_a_report_rebuild_the_same_shapes(build):
    model, twin = build("mixtral"), build("mixtral").to("meta")
    report = factorize_modules(model, ratio=0.25, exclude="layers.0.*", overrides={"q_proj": 3})
    factorize_modules(twin, include=list(report.ranks), overrides=report.ranks)
    twin.load_state_dict(model.state_dict(), assign=True)


def test_include_exclude_and_overrides(build):
    report = factorize_modules(
        build("llama"), include=["*.mlp.*", "q_proj"], exclude="layers.0.*", overrides={"q_proj": 3, "*": 4}
    )
    prefix = "model.layers.1"
    assert report.ranks == {
        f"{prefix}.self_attn.q_proj": 3,
        f"{prefix}.mlp.gate_proj": 4,
        f"{prefix}.mlp.up_proj": 4,
        f"{prefix}.mlp.down_proj": 4,
    }


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(include="w_proj"), r"include pattern 'w_proj' matches none of the 14 weights \(they are called model"),
        (dict(exclude=["q_proj", "lm_haed"]), "exclude pattern 'lm_haed' matches none"),
        (dict(overrides={"layers.7.*": 4}), r"override pattern 'layers.7.\*' matches none"),
        (dict(overrides={"q_proj": 4}, exclude="q_proj"), "override pattern 'q_proj' matches none of the 12"),
        (dict(value=17), r"rank of model.layers.0.self_attn.k_proj .*\[1, 16\].*got 17"),
        (dict(value=0), r"\[1, 32\].*got 0"),
        (dict(overrides={"v_proj": 40}), r"rank of model.layers.0.self_attn.v_proj .*\[1, 16\].*got 40"),
        (dict(ratio=0.5, value=4), "not both: ratio 0.5, value 4"),
        (dict(ratio=-1.0), "positive number, got -1.0"),
        (dict(rule="rule"), "unknown rank rule 'rule'"),
        (dict(kind="tucker"), "kind='tucker'.*known kinds: lowrank"),
        (dict(init="zeros"), "init='zeros'"),
    ],
)
def test_a_bad_request_is_one_sentence_and_changes_nothing(options, complaint, build):
    model = build("llama")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=complaint) as error:
        factorize_modules(model, **options)
    assert "\n" not in str(error.value) and list(model.state_dict()) == keys


def test_an_explicit_rank_above_break_even_is_obeyed_with_a_warning(build):
    report = factorize_modules(build("llama"), value=16, include="q_proj")
    assert set(report.ranks.values()) == {16} and all("break-even is 16.0" in w for w in report.warnings)


def test_nothing_found_is_an_error():
    with pytest.raises(ValueError, match="no dense linear layer to factorize in Embedding"):
        factorize_modules(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="in Linear"):
        factorize_modules(nn.Linear(4, 4))  # a module cannot be replaced inside itself


def test_a_large_weight_may_not_stay_dense_unnoticed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.mixer = nn.Parameter(torch.randn(16, 16))

    with pytest.raises(ValueError, match=r"mixer \(48.5%\).*exclude them by name"):
        factorize_modules(Odd())
    for options in (dict(exclude="mixer"), dict(require_all=False), dict(include="linear")):
        assert list(factorize_modules(Odd(), **options).ranks) == ["linear"]


def test_the_router_of_a_tiny_mixture_must_be_named(build):
    model = build("mixtral", num_local_experts=16, intermediate_size=8)  # experts so thin that the router counts
    with pytest.raises(ValueError, match=r"mlp.gate.weight \(1.\d%\).*exclude them by name"):
        factorize_modules(model)
    factorize_modules(model, exclude="gate")


def test_attention_that_reads_weights_directly_is_left_alone():
    net = nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2))
    assert list(linear_modules(net)) == ["0"]
    with pytest.raises(ValueError, match=r"1\.in_proj_weight.*1\.out_proj\.weight"):
        factorize_modules(net)
    factorize_modules(net, exclude=["in_proj_weight", "out_proj"])
    x = torch.randn(3, 1, 16)
    assert net[1](x, x, x)[0].shape == x.shape
