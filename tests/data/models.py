"""Tiny causal language models of several families with random weights, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300
HIDDEN = 32
LENGTH = 64
_TOKENS: Any = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@cache
def text(characters: int) -> str:
    """The start of the language reference that every Python carries."""
    return "\n\n".join(topics[key] for key in sorted(topics))[:characters]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([text(40_000)], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>"
    )


def llama(*, tied: bool = False) -> PreTrainedModel:
    """Grouped queries, gated feed-forward, no biases."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
            tie_word_embeddings=tied, **_TOKENS,
        )
    )  # fmt: skip


def llama_tied() -> PreTrainedModel:
    """Llama whose head is its embedding matrix."""
    return llama(tied=True)


def gpt2() -> PreTrainedModel:
    """Conv1D with biases, fused queries, keys and values, tied head."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=LENGTH, n_inner=48, **_TOKENS)
    )


def opt() -> PreTrainedModel:
    """Biases, tied head, and matrices that project embeddings of another width."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=LENGTH, word_embed_proj_dim=24, **_TOKENS,
        )
    )  # fmt: skip


def gpt_neox() -> PreTrainedModel:
    """Biases, fused queries, keys and values, parallel residuals."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH, **_TOKENS,
        )
    )  # fmt: skip


def bert() -> PreTrainedModel:
    """BERT as a decoder: a head with a transform, a bias of its own and a tied matrix."""
    return BertLMHeadModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH, is_decoder=True, **_TOKENS,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama_tied": llama_tied,
    "gpt2": gpt2,
    "opt": opt,
    "gpt_neox": gpt_neox,
    "bert": bert,
}


def make(family: str, *, scale: float = 0.15) -> PreTrainedModel:
    """A model of ``family`` in evaluation mode whose weights need no gradient.

    Weights are larger than a fresh model's, and biases not zero, so that every layer has a say in the output.
    """
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and "ln_" not in name:
            nn.init.normal_(parameter, std=scale)
    model.train(False)
    model.requires_grad_(False)
    return model


def save(family: str, folder: Path) -> Path:
    """A saved model of ``family`` with the tokenizer."""
    make(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class SharedBlocks(nn.Module):
    """One block that runs at every depth, as in ALBERT, and one matrix that stands twice in it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        down = nn.Linear(2 * width, width)
        block = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": down, "again": down})
        self.layers = nn.ModuleList([block, block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](block["up"](x).relu()) + block["again"](block["up"](x).tanh())
        return x
