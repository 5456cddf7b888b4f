"""Small models of every family, trained for a moment, so that their layers differ as a real model's do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from rank_search.task import CAUSAL_LM, IGNORED, MASKED_LM, SEQ2SEQ_LM, SEQUENCE_CLASSIFICATION, Examples, Task
from tests.data import models
from tests.data.models import HIDDEN, LENGTH, VOCABULARY

_SIZES: Any = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
MASK = 1
"""The token that hides another one."""
_IMAGE, _CLASSES = 8, 5


def mistral() -> PreTrainedModel:
    """Grouped queries, a sliding window."""
    return MistralForCausalLM(MistralConfig(**_SIZES, num_key_value_heads=2, sliding_window=16))


def qwen2() -> PreTrainedModel:
    """Grouped queries; queries, keys and values have biases, the output projection has none."""
    return Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2))


def qwen2_moe() -> PreTrainedModel:
    """Experts in one piece, and a shared one of ordinary layers beside them."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=48,
        )
    )  # fmt: skip


def qwen3() -> PreTrainedModel:
    """Grouped queries, normed heads whose size is not the width by their number."""
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=12))


def phi3() -> PreTrainedModel:
    """Fused queries, keys and values with fewer heads of the latter; fused gates."""
    return Phi3ForCausalLM(Phi3Config(**_SIZES, num_key_value_heads=2))


def mixtral() -> PreTrainedModel:
    """Experts in one piece."""
    return MixtralForCausalLM(MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4))


def bert() -> PreTrainedModel:
    """An encoder that fills in masked tokens."""
    return BertForMaskedLM(BertConfig(**_SIZES))


def albert() -> PreTrainedModel:
    """One layer for all blocks."""
    return AlbertForMaskedLM(AlbertConfig(**_SIZES, embedding_size=16))


def t5() -> PreTrainedModel:
    """Encoder and decoder; heads whose size is not the width by their number."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=6, d_ff=48, num_layers=2, num_heads=4,
            relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def vit() -> PreTrainedModel:
    """Images."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=_IMAGE,
            patch_size=2, num_channels=1, num_labels=_CLASSES,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a model of one family is made, loaded and asked, and whether its heads are tried one by one."""

    make: Callable[[], PreTrainedModel]
    task: Task = CAUSAL_LM
    fused: bool = False
    by_head: bool = True
    auto_class: str = ""

    @property
    def loaded_by(self) -> str:
        """The class of transformers that loads it."""
        return self.auto_class or self.task.auto_class


FAMILIES = {
    "llama": Family(models.llama),
    "mistral": Family(mistral),
    "qwen2": Family(qwen2, by_head=False),
    "qwen2_moe": Family(qwen2_moe, by_head=False),
    "qwen3": Family(qwen3),
    "opt": Family(models.opt),
    "gpt2": Family(models.gpt2, fused=True),
    "gpt_neox": Family(models.gpt_neox, fused=True),
    "phi3": Family(phi3, fused=True),
    "mixtral": Family(mixtral),
    "bert": Family(bert, MASKED_LM),
    "albert": Family(albert, MASKED_LM),
    "t5": Family(t5, SEQ2SEQ_LM),
    "vit": Family(vit, SEQUENCE_CLASSIFICATION, auto_class="AutoModelForImageClassification"),
}


class Pixels(nn.Module):
    """A model of images asked as one of texts: its tokens are grey values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(pixel_values=pixels(input_ids))


def pixels(ids: Tensor) -> Tensor:
    """Images (examples, 1, side, side) of token ids, one a pixel."""
    return (ids.float() / VOCABULARY - 0.5).view(-1, 1, _IMAGE, _IMAGE)


def asked(model: PreTrainedModel) -> nn.Module:
    """What takes the examples of the model's family."""
    return Pixels(model) if model.config.model_type == "vit" else model


@cache
def examples(family: str, count: int = 96) -> Examples:
    """Examples of a family's task from the language reference."""
    task = FAMILIES[family].task
    if family == "vit":
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(count) % _CLASSES
        # Classes are told by where the bright rows are.
        ids = torch.randint(0, VOCABULARY // 3, (count, _IMAGE, _IMAGE), generator=generator)
        ids[torch.arange(count), labels] += VOCABULARY // 2
        return Examples(task, {"input_ids": ids.flatten(1), "labels": labels[:, None]})
    ids = torch.tensor(models.tokenizer()(models.text(20_000))["input_ids"][: count * 24]).view(count, 24)
    if task is CAUSAL_LM:
        return Examples.causal(ids)
    if task is SEQ2SEQ_LM:
        return Examples(task, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :12]})
    masked = torch.arange(24) % 6 == torch.arange(count)[:, None] % 6
    return Examples(
        task,
        {
            "input_ids": ids.where(~masked, torch.tensor(MASK)), "attention_mask": torch.ones_like(ids),
            "labels": ids.where(masked, torch.tensor(IGNORED)),
        },
    )  # fmt: skip


@cache
def _trained(family: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    whole, task, given = asked(model), FAMILIES[family].task, examples(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = given[torch.arange(step * 16, (step + 1) * 16) % len(given)].tensors
        task.loss(whole, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def trained(family: str) -> PreTrainedModel:
    """A model of a family after 60 steps, in evaluation mode; its weights need no gradient."""
    model = FAMILIES[family].make()
    model.load_state_dict(_trained(family))
    model.train(False)
    return model.requires_grad_(False)
