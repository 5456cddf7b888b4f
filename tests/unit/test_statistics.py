"""Layer statistics are the second moments that they claim to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rank_search.errors import NonFiniteLossError, TargetError
from rank_search.factors.statistics import LayerStatistics, collect_statistics
from rank_search.model.targets import Target, find_targets
from rank_search.spec import TargetSpec
from rank_search.task import Examples
from tests.data import models

BLOCKS = (torch.arange(6 * 12).view(6, 12) * 37 % models.VOCABULARY).int()
EXAMPLES = Examples.causal(BLOCKS)
FAMILIES = ("llama", "gpt2", "opt", "gpt_neox")


def _recorded(
    model: PreTrainedModel, targets: tuple[Target, ...], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs (tokens, n) and gradients of one token's loss at the outputs (tokens, m), gathered batch by batch."""
    inputs: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    gradients: dict[str, list[Tensor]] = {target.name: [] for target in targets}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name].append(args[0].detach().flatten(0, -2).double())
            output.register_hook(lambda g: gradients[name].append(g.flatten(0, -2).double()))

        return hook

    handles = [target.module.register_forward_hook(remember(target.name)) for target in targets]
    generator = torch.Generator().manual_seed(seed)
    # Another way to the gradients at the outputs: through the weights.
    model.requires_grad_(True)
    for batch in BLOCKS.long().split(4):
        logits = model(input_ids=batch).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        F.cross_entropy(logits, labels, reduction="sum").backward()
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return ({name: torch.cat(x) for name, x in inputs.items()}, {name: torch.cat(g) for name, g in gradients.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_inputs_and_of_gradients_at_sampled_labels(family: str) -> None:
    model = models.make(family)
    targets = find_targets(model, TargetSpec())
    inputs, gradients = _recorded(model, targets, seed=3)
    found = collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=3)
    for target in targets:
        x, g = inputs[target.name], gradients[target.name]
        assert len(x) == len(g) == BLOCKS.numel()
        A, G, mean_abs = found[target.name].A, found[target.name].G, found[target.name].mean_abs
        assert A is not None
        assert G is not None
        assert mean_abs is not None
        torch.testing.assert_close(mean_abs, x.abs().mean(0), rtol=1e-5, atol=1e-9)
        assert A.dtype == G.dtype == torch.float64
        torch.testing.assert_close(A, x.T @ x / len(x), rtol=1e-5, atol=1e-6 * float(A.diagonal().max()))
        torch.testing.assert_close(G, g.T @ g / len(g), rtol=1e-4, atol=1e-5 * float(G.diagonal().max()))


def test_layers_that_read_the_same_tensor_share_one_moment() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    found = collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=0)
    block = "model.layers.0."
    A = {name.removeprefix(block): layer.A for name, layer in found.items() if name.startswith(block)}
    assert A["self_attn.q_proj"] is A["self_attn.k_proj"] is A["self_attn.v_proj"]
    assert A["mlp.gate_proj"] is A["mlp.up_proj"]
    assert len({id(moment) for moment in A.values()}) == 4


def test_collecting_leaves_the_model_alone() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_seed_gives_the_same_statistics_and_another_seed_other_labels() -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    first, again, other = (collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=s) for s in (0, 0, 1))
    for name in first:
        (A, G), (A_again, G_again), (A_other, G_other) = (_both(of[name]) for of in (first, again, other))
        assert torch.equal(A, A_again)
        assert torch.equal(G, G_again)
        assert torch.equal(A, A_other)
        assert not torch.equal(G, G_other)


@pytest.mark.parametrize(("inputs", "gradients"), [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_is_collected(inputs: bool, gradients: bool) -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    found = collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=0, inputs=inputs, gradients=gradients)
    full = collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=0)
    for name, layer in found.items():
        assert (layer.A is not None, layer.G is not None) == (inputs, gradients)
        if layer.A is not None:
            torch.testing.assert_close(layer.A, full[name].A)
        if layer.G is not None:
            torch.testing.assert_close(layer.G, full[name].G)


def test_batches_of_another_size_give_the_same_inputs() -> None:
    model = models.make("opt")
    targets = find_targets(model, TargetSpec())
    few, many = (collect_statistics(model, targets, EXAMPLES, batch_blocks=b, seed=0, gradients=False) for b in (1, 6))
    for name, layer in few.items():
        torch.testing.assert_close(layer.A, many[name].A, rtol=1e-5, atol=1e-6)


def _both(layer: LayerStatistics) -> tuple[Tensor, Tensor]:
    assert layer.A is not None
    assert layer.G is not None
    return layer.A, layer.G


class _Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Looped(PreTrainedModel):  # type: ignore[no-untyped-call]
    """An embedding and a head around one layer that runs ``runs`` times; ``idle`` never runs."""

    def __init__(self, runs: int, *, in_place: bool = False) -> None:
        from transformers import PretrainedConfig

        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.runs, self.in_place = runs, in_place
        self.embedding = nn.Embedding(models.VOCABULARY, 6)
        self.blocks = nn.ModuleList([nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)})])
        self.head = nn.Linear(6, models.VOCABULARY)
        self.train(False)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> _Output:
        x = self.embedding(input_ids)
        for _ in range(self.runs):
            y = self.get_submodule("blocks.0.used")(x)
            x = y.relu_() if self.in_place else y.relu()
        return _Output(self.head(x))


def test_a_layer_that_runs_twice_adds_its_gradients_and_averages_its_inputs() -> None:
    model = _Looped(2)
    targets = find_targets(model, TargetSpec(exclude=("*idle",)))
    inputs, gradients = _recorded(model, targets, seed=0)
    found = collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=0)["blocks.0.used"]
    x, g = inputs["blocks.0.used"], gradients["blocks.0.used"]
    assert len(x) == len(g) == 2 * BLOCKS.numel()
    torch.testing.assert_close(found.A, x.T @ x / (2 * BLOCKS.numel()), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.G, g.T @ g / BLOCKS.numel(), rtol=1e-4, atol=1e-9)


def test_a_model_that_goes_on_in_place_has_the_same_statistics() -> None:
    plain, in_place = _Looped(2), _Looped(2, in_place=True)
    spec = TargetSpec(exclude=("*idle",))
    expected, found = (
        collect_statistics(model, find_targets(model, spec), EXAMPLES, batch_blocks=4, seed=0)["blocks.0.used"]
        for model in (plain, in_place)
    )
    assert torch.equal(_both(expected)[0], _both(found)[0])
    assert torch.equal(_both(expected)[1], _both(found)[1])


class _Changing(_Looped):  # type: ignore[no-untyped-call]
    """Two layers read one tensor, which is changed in its place in between."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> _Output:
        x = self.embedding(input_ids)
        first = self.get_submodule("blocks.0.used")(x)
        return _Output(self.head(first + self.get_submodule("blocks.0.idle")(x.relu_())))


def test_a_tensor_that_changes_between_two_layers_is_not_shared() -> None:
    model = _Changing(1)
    found = collect_statistics(model, find_targets(model, TargetSpec()), EXAMPLES, batch_blocks=6, seed=0)
    x = model.embedding(BLOCKS.long()).flatten(0, 1).double()
    for name, inputs in (("blocks.0.used", x), ("blocks.0.idle", x.relu())):
        torch.testing.assert_close(found[name].A, inputs.T @ inputs / len(inputs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("exclude", [(), ("*used",)])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_layer_that_the_model_does_not_use_is_named(gradients: bool, exclude: tuple[str, ...]) -> None:
    model = _Looped(1)
    with pytest.raises(TargetError, match=r"^blocks.0.idle has no part in the model's output .* exclude it"):
        collect_statistics(
            model,
            find_targets(model, TargetSpec(exclude=exclude)),
            EXAMPLES,
            batch_blocks=4,
            seed=0,
            gradients=gradients,
        )


def test_an_output_that_is_not_finite_is_refused() -> None:
    model = models.make("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.inf
    with pytest.raises(NonFiniteLossError, match="output on the calibration blocks is not finite"):
        collect_statistics(model, find_targets(model, TargetSpec()), EXAMPLES, batch_blocks=4, seed=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_predicted_rise_is_the_rise_of_the_divergence_from_the_dense_model() -> None:
    """To second order, the mean divergence of the changed model is ½ tr(Δᵀ G Δ A), if the two factors are unrelated."""
    model = models.make("llama", scale=0.1)
    targets = find_targets(model, TargetSpec())
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(models.VOCABULARY, (128, 16), generator=generator).int()
    found = collect_statistics(model, targets, Examples.causal(blocks), batch_blocks=32, seed=0)
    with torch.no_grad():
        dense = model(input_ids=blocks.long()).logits.log_softmax(-1)
    for target in targets:
        weight = target.module.weight
        assert isinstance(weight, Tensor)
        delta = 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
        A, G = _both(found[target.name])
        predicted = 0.5 * float(torch.trace(delta.double().T @ G @ delta.double() @ A))
        with torch.no_grad():
            before = weight.clone()
            weight += delta
            changed = model(input_ids=blocks.long()).logits.log_softmax(-1)
            weight.copy_(before)
        measured = float(F.kl_div(changed, dense, log_target=True, reduction="sum")) / blocks.numel()
        # A value's error is one and the same for all later tokens that attend to it, which no second moment of single
        # tokens can know.
        least = 0.2 if target.shape.group == "self_attn.v_proj" else 0.6
        assert least < predicted / measured < 1.5, target.name


@pytest.mark.parametrize("batch_blocks", [1, 2, 6])
def test_they_do_not_depend_on_how_many_blocks_make_a_batch(batch_blocks: int) -> None:
    model = models.make("llama")
    targets = find_targets(model, TargetSpec())
    found = collect_statistics(model, targets, EXAMPLES, batch_blocks=batch_blocks, seed=5)
    expected = collect_statistics(model, targets, EXAMPLES, batch_blocks=4, seed=5)
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].A, layer.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name].G, layer.G, rtol=1e-4, atol=1e-6)
