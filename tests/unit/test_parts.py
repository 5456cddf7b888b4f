"""Parts of matrices: whose rows and columns they are, what they share, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CodeGenConfig,
    CodeGenForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
)

from rank_search.compress.low_rank import LowRankLinear, compressed, place
from rank_search.compress.pivoted import PivotedLinear
from rank_search.compress.split import SplitLinear
from rank_search.errors import TargetError
from rank_search.factors.decompose import Factors
from rank_search.factors.statistics import LayerStatistics, collect_statistics
from rank_search.model.parts import Heads, Part, complement, parts_of
from rank_search.model.targets import (
    Target,
    find_targets,
    other_matrices,
    rank_space,
    told_of_other_matrices,
    weight_matrix,
)
from rank_search.ranks import RankMap
from rank_search.spec import TargetSpec
from rank_search.task import Examples
from tests.data import families, models
from tests.data.models import HIDDEN, LENGTH, VOCABULARY

SPLIT, HEADS = TargetSpec(split_qkv=True), TargetSpec(granularity="head")
IDS = torch.arange(60).view(2, 30) * 7 % VOCABULARY


def _big_code(multi_query: bool) -> PreTrainedModel:
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=4, n_positions=LENGTH, n_inner=48,
            multi_query=multi_query, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


FUSED: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": models.gpt2,
    "gpt_neox": models.gpt_neox,
    "phi3": families.phi3,
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=1, n_head=4)),
    "bigcode, one key": lambda: _big_code(True),
    "bigcode, all keys": lambda: _big_code(False),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, cls_token_id=0, sep_token_id=0,
        )
    ),
}  # fmt: skip


def _first_module(targets: tuple[Target, ...]) -> dict[str, Target]:
    """Label → target, of the first module that is in parts."""
    module = next(target.module_name for target in targets if target.part)
    return {t.part.label: t for t in targets if t.part and t.module_name == module}


@pytest.mark.parametrize("family", FUSED)
def test_the_parts_of_a_fused_projection_are_its_queries_keys_and_values(family: str) -> None:
    """Attention stays as it was when queries double and keys halve, and what it gives doubles with the values."""
    torch.manual_seed(0)
    model = FUSED[family]().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    targets = find_targets(model, TargetSpec(split_qkv=True, layers="attention"))
    parts = _first_module(targets)
    assert parts.keys() == {"q", "k", "v"}
    output = next(target.module for target in targets if target.part is None)
    given: list[Tensor] = []
    output.register_forward_hook(lambda _module, args, _output: given.append(args[0]))

    def attention(**scales: float) -> Tensor:
        """What attention gives when rows of the fused projection are scaled."""
        factors = torch.ones(len(weight_matrix(parts["q"].module)))
        for label, scale in scales.items():
            for start, stop in _part(parts[label]).runs:
                factors[start:stop] = scale
        handle = parts["q"].module.register_forward_hook(lambda _module, _args, output: output * factors)
        model(input_ids=IDS)
        handle.remove()
        return given[-1]

    plain = attention()
    torch.testing.assert_close(attention(q=2.0, k=0.5), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention(v=2.0), 2 * plain, rtol=1e-4, atol=1e-5)
    assert float((attention(q=2.0) - plain).norm() / plain.norm()) > 0.01


def _part(target: Target) -> Part:
    assert target.part is not None
    return target.part


def test_names_shapes_types_and_depths() -> None:
    (*_, last) = find_targets(models.make("gpt_neox"), TargetSpec(split_qkv=True, exclude=("*dense*",)))
    assert (last.name, last.shape.m, last.shape.n) == ("gpt_neox.layers.1.attention.query_key_value.v", 32, 32)
    assert (last.shape.group, last.shape.depth) == ("attention.query_key_value.v", 1)
    assert _part(last).runs == ((32, 48), (80, 96)), "two heads of 16, each with its query, its key and its value"


@pytest.mark.parametrize(
    ("family", "counts", "size"),
    [
        ("llama", {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}, 8),
        ("qwen3", {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}, 12),
        ("phi3", {"qkv_proj.q": 4, "qkv_proj.k": 2, "qkv_proj.v": 2, "o_proj": 4}, 8),
        ("bert", {"self.query": 4, "self.key": 4, "self.value": 4, "output.dense": 4}, 8),
        ("t5", {"Attention.q": 4, "Attention.k": 4, "Attention.v": 4, "Attention.o": 4}, 6),
    ],
)
def test_heads_are_as_many_and_as_large_as_the_configuration_says(
    family: str, counts: dict[str, int], size: int
) -> None:
    model = families.FAMILIES[family].make()
    targets = [target for target in find_targets(model, HEADS) if target.part]
    first = {t.module_name for t in targets if t.shape.depth == 0 and "decoder" not in t.name}
    assert sum(t.module_name in first for t in targets) == sum(counts.values())
    for kind, count in counts.items():
        heads = [t for t in targets if t.module_name in first and f"{kind}.head." in t.name]
        assert [t.name.rsplit(".", 1)[-1] for t in heads] == [str(i) for i in range(count)], kind
        assert {min(t.shape.m, t.shape.n) for t in heads} == {size}
        assert {t.shape.max_rank("pivoted") for t in heads} == {size - 1}
        assert len({t.shape.group for t in heads}) == 1
    assert all(min(t.shape.m, t.shape.n) > size for t in find_targets(model, HEADS) if not t.part), "the rest is whole"


@pytest.mark.parametrize("spec", [SPLIT, HEADS], ids=["split", "head"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_parts_make_up_the_matrix(family: str, spec: TargetSpec) -> None:
    model = families.FAMILIES[family].make()
    targets = find_targets(model, spec)
    for module in {target.module for target in targets if target.part}:
        parts = [target for target in targets if target.module is module]
        rebuilt = torch.full_like(weight_matrix(module), torch.nan)
        for target in parts:
            runs = torch.cat([torch.arange(*run) for run in _part(target).runs])
            rebuilt[(runs,) if _part(target).axis == "rows" else (slice(None), runs)] = target.matrix
            assert target.matrix.shape == (target.shape.m, target.shape.n)
        assert torch.equal(rebuilt, weight_matrix(module))
        assert sum(target.shape.dense_params for target in parts) == weight_matrix(module).numel()


def test_statistics_of_a_part_are_blocks_of_its_modules() -> None:
    model = models.make("gpt_neox")
    examples = Examples.causal(torch.arange(6 * 12).view(6, 12) * 37 % VOCABULARY)

    def collected(spec: TargetSpec) -> tuple[tuple[Target, ...], dict[str, LayerStatistics]]:
        targets = find_targets(model, spec)
        return targets, collect_statistics(model, targets, examples, batch_blocks=3, seed=0)

    _, whole = collected(TargetSpec())
    targets, found = collected(HEADS)
    for target in targets:
        module, own = whole[target.module_name], found[target.name]
        assert module.A is not None and module.G is not None and module.mean_abs is not None  # noqa: PT018
        if target.part is None:
            expected = module.A, module.G, module.mean_abs
        else:
            runs = torch.cat([torch.arange(*run) for run in target.part.runs])
            block = torch.meshgrid(runs, runs, indexing="ij")
            rows = target.part.axis == "rows"
            expected = (
                module.A if rows else module.A[block],
                module.G[block] if rows else module.G,
                module.mean_abs if rows else module.mean_abs[runs],
            )
        for value, of_module in zip((own.A, own.G, own.mean_abs), expected, strict=True):
            assert value is not None
            assert torch.equal(value, of_module), target.name
    block_name = "gpt_neox.layers.0.attention.query_key_value"
    assert found[f"{block_name}.q.head.0"].A is found[f"{block_name}.v.head.1"].A, "rows read one tensor"


def _of_rank_one(targets: tuple[Target, ...]) -> dict[str, Factors]:
    return {
        t.name: Factors(torch.randn(1, t.shape.m), torch.randn(1, t.shape.n), torch.ones(1, dtype=torch.float64))
        for t in targets
    }


def test_what_no_part_holds_stays_as_it_is() -> None:
    """Queries and values alone are of low rank; keys and the bias are the dense layer's."""
    model = models.make("gpt_neox")
    targets = find_targets(model, TargetSpec(split_qkv=True, layers="query-value"))
    assert {_part(target).label for target in targets} == {"q", "v"}
    dense = targets[0].module
    space = rank_space(model, targets, SPLIT.model_copy(update={"storage": "two-factor"}))
    x = torch.randn(3, HIDDEN)
    keys = torch.cat([torch.arange(16, 32), torch.arange(64, 80)])
    with compressed(targets, _of_rank_one(targets), RankMap({t.name: 1 for t in targets})) as layers:
        split = model.get_submodule(targets[0].module_name)
        assert isinstance(split, SplitLinear)
        assert all(model.get_submodule(name) is layer for name, layer in layers.items())
        torch.testing.assert_close(split(x)[:, keys], dense(x)[:, keys])
        torch.testing.assert_close(split(x), x @ split.dense().T + split.bias)
        assert torch.linalg.matrix_rank(split.dense()[~torch.isin(torch.arange(96), keys)]) <= 2
        assert sum(p.numel() for p in model.parameters()) == space.num_params(RankMap({n: 1 for n in layers}))
    assert model.get_submodule(targets[0].module_name) is dense


def test_a_dense_rest_outlives_a_change_of_storage() -> None:
    model = models.make("llama")
    targets = tuple(t for t in find_targets(model, HEADS) if t.name.endswith("o_proj.head.2"))
    with compressed(targets, _of_rank_one(targets), RankMap({t.name: 1 for t in targets})) as layers:
        rest = model.get_submodule(f"{targets[0].module_name}.rest")
        place(targets, {name: PivotedLinear.of(layer) for name, layer in layers.items()})
        assert model.get_submodule(f"{targets[0].module_name}.rest") is rest


def test_a_layers_matrix_can_be_read_as_well() -> None:
    """T5 asks its last projection's matrix for its dtype before it calls it."""
    torch.manual_seed(0)
    target = find_targets(models.make("llama"), TargetSpec())[0]
    with compressed((target,), _of_rank_one((target,)), RankMap({target.name: 1})) as layers:
        (layer,) = layers.values()
        torch.testing.assert_close(layer.weight, layer.outer.weight @ layer.inner.weight)
        torch.testing.assert_close(PivotedLinear.of(layer).weight, layer.weight, rtol=1e-4, atol=1e-5)


def test_patterns_name_parts_and_their_modules() -> None:
    model = models.make("gpt2")

    def names(**patterns: Any) -> list[str]:
        found = find_targets(model, TargetSpec(split_qkv=True, layers="attention", **patterns))
        return [target.name.removeprefix("transformer.h.") for target in found]

    assert names(exclude=("*.1.*", "*.c_attn.k")) == ["0.attn.c_attn.q", "0.attn.c_attn.v", "0.attn.c_proj"]
    assert "1.attn.c_attn.k" not in names(exclude=("*.1.attn.c_attn",))
    assert names(include=("*.0.mlp.c_fc",))[4] == "0.mlp.c_fc"


def _heads_refused(name: str, module: nn.Linear, heads: Heads | None, *, by_head: bool) -> str:
    with pytest.raises(TargetError) as caught:
        parts_of(name, module, module.out_features, module.in_features, heads, by_head=by_head)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_layouts_that_cannot_be_told_are_refused() -> None:
    heads = Heads(4, 8, 32)
    assert _heads_refused("h.0.attn.q_proj", nn.Linear(32, 64), heads, by_head=True) == (
        "h.0.attn.q_proj: its heads cannot be told in a (64, 32) matrix (4 heads of 8); exclude it or set "
        'targets.granularity = "matrix"'
    )
    assert "query, key and value cannot be told" in _heads_refused("a.qkv", nn.Linear(32, 64), heads, by_head=False)
    assert "exclude it or set targets.split_qkv = false" in _heads_refused(
        "a.mixed", nn.Linear(32, 96), heads, by_head=False
    ), "a shape alone does not tell in which order"
    assert "no number of heads" in _heads_refused("h.0.attn.q_proj", nn.Linear(32, 32), None, by_head=True)
    assert "its heads cannot be told" in _heads_refused("a.gate", nn.Linear(32, 5), heads, by_head=True)


def test_a_layout_of_its_own_is_refused_only_where_it_is_selected() -> None:
    model = CodeGenForCausalLM(CodeGenConfig(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=4, rotary_dim=4))
    with pytest.raises(TargetError, match=r"^transformer.h.0.attn.qkv_proj: its query, key and value cannot be told"):
        find_targets(model, SPLIT)
    assert len(find_targets(model, TargetSpec())) == 4
    assert len(find_targets(model, TargetSpec(granularity="head", exclude=("*qkv_proj",)))) == 4 + 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPLIT, r"^targets.split_qkv = true, but no fused QKV is selected; leave it out$"),
        (TargetSpec(granularity="head", exclude=("*attn*",)), r'^targets.granularity = "head", but no projection of'),
        (TargetSpec(granularity="head", split_qkv=True), r"^targets.split_qkv = true, but no fused QKV is selected"),
    ],
)
def test_nothing_to_split_is_refused(spec: TargetSpec, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        find_targets(models.make("llama"), spec)


def test_experts_in_one_piece_stay_dense_and_are_told_of() -> None:
    model = families.mixtral()
    assert {t.shape.group.split(".")[0] for t in find_targets(model, TargetSpec())} == {"self_attn"}
    held = 2 * 4 * (2 * 48 + 48 + 1) * HIDDEN / model.num_parameters()  # and a router's row for every expert
    assert told_of_other_matrices(model) == (
        "model.layers.0.mlp.experts.gate_up_proj and 5 more: parameters of two or three dimensions outside of "
        f"nn.Linear (experts of a mixture, say) are left dense; they hold {held:.1%} of the model"
    )
    assert told_of_other_matrices(models.make("llama")) is None
    assert told_of_other_matrices(families.vit()) is None, "positions and class tokens are no experts"
    for pattern in ("*.0.mlp.experts", "*experts.down_proj"):
        with pytest.raises(TargetError, match=r"experts\.\w+, a parameter \(4, .*, which must stay dense; name linear"):
            find_targets(model, TargetSpec(include=(pattern,)))


def test_experts_with_their_rows_one_after_the_other_are_told_of() -> None:
    config = DbrxConfig(
        d_model=HIDDEN, n_heads=4, n_layers=1, max_seq_len=LENGTH, vocab_size=VOCABULARY,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    )  # fmt: skip
    told = told_of_other_matrices(DbrxForCausalLM(config))
    assert told is not None
    assert told.startswith("transformer.blocks.0.ffn.experts.mlp.w1 and 2 more: parameters of two or three dimensions")


def test_parameters_that_modules_share_are_told_of_once_and_biases_not_at_all() -> None:
    model = families.mixtral()
    first, second = (layer.mlp.experts for layer in model.model.layers[:2])
    second.gate_up_proj, second.down_proj = first.gate_up_proj, first.down_proj
    first.down_bias = torch.nn.Parameter(torch.zeros(4, HIDDEN))
    told = [name for name, _ in other_matrices(model)]
    assert "model.layers.0.mlp.experts.down_bias" not in told
    held = (4 * (2 * 48 + 48) + 2 * 4) * HIDDEN / model.num_parameters()
    assert (told_of_other_matrices(model) or "").endswith(f"they hold {held:.1%} of the model")


def test_what_runs_leave() -> None:
    assert complement([(4, 6), (0, 2)], 8) == ((2, 4), (6, 8))
    assert complement([(0, 8)], 8) == ()
    assert complement([], 3) == ((0, 3),)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_under_autocast_every_form_of_a_layer_gives_the_short_dtype(family: str) -> None:
    """Queries, keys and values of two dtypes cannot attend to each other."""
    model = models.make(family)
    targets = find_targets(model, TargetSpec(granularity="head", layers="attention"))
    x = torch.randn(2, 5, HIDDEN)
    with (
        compressed(targets, _of_rank_one(targets), RankMap({t.name: 1 for t in targets[1:]})) as layers,
        torch.autocast("cpu", torch.bfloat16),
        torch.no_grad(),
    ):
        assert model.get_submodule(targets[0].module_name)(x).dtype == torch.bfloat16
        place(targets, {name: PivotedLinear.of(layer) for name, layer in layers.items()})
        assert model.get_submodule(targets[0].module_name)(x).dtype == torch.bfloat16
        whole = find_targets(models.make(family), TargetSpec(layers="attention"))[0]
        low_rank = LowRankLinear.of(_of_rank_one((whole,))[whole.name], 1, whole)
        assert PivotedLinear.of(low_rank)(x).dtype == low_rank(x).dtype == torch.bfloat16


def test_a_part_writes_what_it_reads() -> None:
    matrix = torch.arange(24.0).reshape(6, 4)
    part = Part("m", "q", "rows", ((0, 1), (4, 6)))
    values = torch.full((3, 4), -1.0)
    part.write(matrix, values)
    assert torch.equal(part.of(matrix), values)
    assert torch.equal(matrix[1:4], torch.arange(24.0).reshape(6, 4)[1:4])
