"""Which layers are target layers, in models of several families."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rank_search.errors import TargetError
from rank_search.model.targets import find_targets, rank_space, weight_matrix
from rank_search.ranks import RankMap
from rank_search.spec import TargetSpec
from tests.data import models

LLAMA_BLOCK = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def _names(family: str, **spec: object) -> list[str]:
    return [target.name for target in find_targets(models.make(family), TargetSpec(**spec))]  # type: ignore[arg-type]


def _groups(family: str, **spec: object) -> list[str]:
    targets = find_targets(models.make(family), TargetSpec(**spec))  # type: ignore[arg-type]
    return list(dict.fromkeys(target.shape.group for target in targets))


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", list(LLAMA_BLOCK)),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("opt", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]),
        ("gpt_neox", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
        (
            "bert",
            [
                "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                "intermediate.dense", "output.dense",
            ],
        ),
    ],
)  # fmt: skip
def test_all_linear_layers_of_the_blocks_and_nothing_else(family: str, groups: list[str]) -> None:
    # Embeddings, the projections beside OPT's, BERT's head with its transform: all outside of the blocks.
    assert _groups(family) == groups
    assert len(_names(family)) == 2 * len(groups)


def test_attention_alone() -> None:
    assert _groups("llama", layers="attention") == list(LLAMA_BLOCK[:4])
    assert _groups("gpt2", layers="attention") == ["attn.c_attn", "attn.c_proj"]


def test_query_and_value_alone() -> None:
    assert _groups("llama", layers="query-value") == ["self_attn.q_proj", "self_attn.v_proj"]
    assert _groups("bert", layers="query-value") == ["attention.self.query", "attention.self.value"]


def test_names_shapes_and_depths() -> None:
    targets = find_targets(models.make("llama"), TargetSpec())
    assert [target.name for target in targets] == [
        f"model.layers.{depth}.{inner}" for depth in (0, 1) for inner in LLAMA_BLOCK
    ]
    by_name = {target.name: target.shape for target in targets}
    keys = by_name["model.layers.1.self_attn.k_proj"]
    assert (keys.m, keys.n, keys.group, keys.depth) == (16, 32, "self_attn.k_proj", 1)
    assert (by_name["model.layers.0.mlp.down_proj"].m, by_name["model.layers.0.mlp.down_proj"].n) == (32, 48)


def test_gpt2s_matrices_are_stored_transposed() -> None:
    model = models.make("gpt2")
    (target,) = find_targets(model, TargetSpec(exclude=("*c_proj", "*c_fc", "*1.attn.c_attn")))
    assert (target.shape.m, target.shape.n) == (96, 32)
    assert target.module.weight.shape == (32, 96)
    x = torch.randn(4, 32)
    bias = target.module.bias
    assert isinstance(bias, torch.Tensor)
    torch.testing.assert_close(target.module(x), x @ weight_matrix(target.module).T + bias)


def test_a_share_takes_the_largest_layers_first_and_no_more_than_needed() -> None:
    everything = find_targets(models.make("llama"), TargetSpec())
    total = sum(target.shape.dense_params for target in everything)
    chosen = find_targets(models.make("llama"), TargetSpec(share=0.5))
    held = sum(target.shape.dense_params for target in chosen)
    smallest = min(target.shape.dense_params for target in chosen)
    assert held >= 0.5 * total
    assert held - smallest < 0.5 * total
    assert smallest >= max(t.shape.dense_params for t in everything if t.name not in {c.name for c in chosen})


def test_a_share_of_one_is_everything() -> None:
    assert _names("llama", share=1.0) == _names("llama")


def test_patterns_add_and_take_away() -> None:
    assert "lm_head" in _names("llama", include=("lm_head",))
    assert _names("opt", layers="query-value", include=("model.decoder.project_in",))[0] == "model.decoder.project_in"
    assert _groups("llama", exclude=("*.mlp.*", "*o_proj")) == list(LLAMA_BLOCK[:3])
    assert _names("llama", layers="query-value", include=("*.0.mlp.up_proj",), exclude=("*.1.*",)) == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(key: str) -> None:
    with pytest.raises(TargetError, match=rf"^targets.{key} pattern '\*\.up_porj' matches no module of the model; see"):
        _names("llama", **{key: ("*.up_porj",)})


def test_a_pattern_that_matches_another_kind_of_module_is_refused() -> None:
    with pytest.raises(TargetError, match=r"matches model.embed_tokens, which is no linear layer"):
        _names("llama", include=("*embed_tokens",))


def test_nothing_selected_is_refused() -> None:
    with pytest.raises(TargetError, match="no target layer is selected"):
        _names("gpt2", layers="query-value")
    with pytest.raises(TargetError, match="no target layer is selected"):
        _names("llama", exclude=("*",))


def test_a_tied_head_must_stay_dense() -> None:
    with pytest.raises(TargetError, match=r"^lm_head shares its matrix with another module \(tied weights\)"):
        _names("llama_tied", include=("lm_head",))


def test_tied_weights_are_counted_once() -> None:
    untied, tied = models.make("llama"), models.make("llama_tied")
    spaces = [rank_space(model, find_targets(model, TargetSpec()), TargetSpec()) for model in (untied, tied)]
    assert spaces[0].model_params - spaces[1].model_params == models.VOCABULARY * models.HIDDEN
    assert spaces[1].num_params(RankMap()) == tied.num_parameters()


def test_a_module_shared_between_blocks_is_one_target() -> None:
    model = models.SharedBlocks()
    targets = find_targets(model, TargetSpec())
    assert [target.name for target in targets] == ["layers.0.up", "layers.0.down"]
    assert [attribute for _, attribute in targets[1].places] == ["down", "again"]


def test_subclasses_of_linear_are_left_alone() -> None:
    """Their forward pass may be any: a quantised matrix, an adapter, or attention that reads the weight itself."""

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    block = nn.ModuleDict({"plain": nn.Linear(4, 4), "scaled": Scaled(4, 4), "mha": nn.MultiheadAttention(4, 2)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert [target.name for target in find_targets(model, TargetSpec())] == ["layers.0.plain"]
    with pytest.raises(
        TargetError,
        match=r"1 linear layers in the model, and 2 of subclasses that cannot be .*: NonDynamicallyQ.*Linear, Scaled\)",
    ):
        find_targets(model, TargetSpec(exclude=("*.plain",)))
    with pytest.raises(
        TargetError, match=r"matches layers.0.scaled.weight, a parameter \(4, 4\) of Scaled, which must"
    ):
        find_targets(model, TargetSpec(include=("*.scaled",)))


def test_an_encoders_and_a_decoders_layers_are_of_different_types() -> None:
    def stack() -> nn.ModuleDict:
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})])})

    targets = find_targets(nn.ModuleDict({"encoder": stack(), "decoder": stack()}), TargetSpec())
    assert [target.shape.group for target in targets] == ["encoder.layers.fc", "decoder.layers.fc"]
