"""Make the quickstart model: a small Llama trained on the documentation and source of Python itself.

    python scripts/make_quickstart_model.py --text-out text.json.xz        collect the text of this Python, no more
    python scripts/make_quickstart_model.py OUT [--text text.json.xz]      train a tokenizer and a model into OUT

The second form collects the text itself when none is given. Collecting first allows training on another machine,
whose Python may be of another version. Needs torch, transformers and tokenizers; nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from _run import run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

VOCABULARY, LENGTH = 2048, 256
END = "<|endoftext|>"
# Left out of the standard library: what is not part of it, its tests, the topics themselves (their end is held out),
# and the character tables of the codecs, which teach a model nothing but numbers.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
# The documentation is a twentieth of the text but the kind that the model is measured on.
DOCS_REPEATS = 3


@dataclass(frozen=True)
class Text:
    """The text of one Python: what is trained on, what picks the best weights, and what is only ever scored."""

    python: str
    documents: list[str]
    docs: str
    """The first 80 % of the language reference in ``pydoc_data.topics``, in key order."""
    held_out: str
    """The next 10 %: the step with the lowest loss here is the one that is kept."""
    test: str
    """The last 10 %, where the quickstart study validates: scored once, at the end."""


def collect_text() -> Text:
    """Read the language reference and the standard library's modules of the running Python, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [p.relative_to(library) for p in library.rglob("*.py")]
    kept = sorted((p for p in paths if EXCLUDED.isdisjoint(p.parts)), key=lambda p: p.as_posix())
    # The data of sysconfig describe the machine that built this Python, not the language.
    kept = [p for p in kept if not p.as_posix().startswith(("_sysconfigdata", "config-"))]
    documents = [(library / p).read_text(encoding="utf-8") for p in kept]
    reference = "\n\n".join(topics[key] for key in sorted(topics))
    first, second = len(reference) * 8 // 10, len(reference) * 9 // 10
    return Text(platform.python_version(), documents, reference[:first], reference[first:second], reference[second:])


def train_tokenizer(text: Text) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, and decoding gives it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text.docs] * DOCS_REPEATS + text.documents, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """About 2.8 M parameters; grouped queries and tied embeddings, as in the models that the project is for."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], device: str) -> Tensor:
    """One stream of tokens, every document closed by the end token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    return torch.tensor([token for document in encoded for token in [*document.ids, 0]], device=device)


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> float:
    """Mean loss in nats per token over the whole blocks of ``tokens``, all of one size, in float32."""
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    batches = [blocks[i : i + 32] for i in range(0, len(blocks), 32)]
    return sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in batches) / len(blocks)


def train(model: LlamaForCausalLM, tokens: Tensor, held_out: Tensor, options: argparse.Namespace) -> tuple[int, float]:
    """Train, and leave the weights of the lowest held-out loss in the model; returns its step and that loss."""
    adamw = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(adamw, options.steps // 20, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(LENGTH, device=tokens.device)
    best, best_step, weights = float("inf"), 0, {}
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(tokens) - LENGTH, (options.batch, 1), generator=generator).to(tokens.device)
        block = tokens[starts + offsets]
        # bfloat16 also pays on CPUs with matrix units, and is what the studies train in on a GPU.
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=block, labels=block).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        if step % 100 == 0 or step == options.steps:
            value = loss_of(model, held_out)
            print(f"step {step:5d}  train {loss.item():.3f}  held-out {value:.3f}", flush=True)
            if value < best:
                best, best_step = value, step
                weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    model.load_state_dict(weights)
    return best_step, best


def main() -> None:
    """Parse the command line, then collect the text, or train and save the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for the model")
    parser.add_argument("--text", type=Path, help="train on this file, made by --text-out")
    parser.add_argument("--text-out", type=Path, help="only write this Python's text to a file (.json.xz)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help=f"blocks of {LENGTH} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.out is None) == (options.text_out is None):
        parser.error("give either OUT or --text-out FILE")
    if options.text_out is not None:
        options.text_out.write_bytes(lzma.compress(json.dumps(asdict(collect_text())).encode(), preset=9))
        return
    text = Text(**json.loads(lzma.decompress(options.text.read_bytes()))) if options.text else collect_text()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    make(text, found if options.device == "auto" else options.device, options)


def make(text: Text, device: str, options: argparse.Namespace) -> None:
    """Train tokenizer and model on ``text`` and write the folder ``options.out``."""
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(text)
    tokens = encode(tokenizer, [text.docs] * DOCS_REPEATS + text.documents, device)
    with torch.device(device):
        model = new_model()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters, {len(tokens) / 1e6:.2f} M tokens a pass, on {device}", flush=True)
    best, held_out = train(model, tokens, encode(tokenizer, [text.held_out], device), options)
    # Half precision halves the folder; the test loss is that of the weights as they were saved.
    model.half().save_pretrained(options.out)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(options.out)
    saved = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    test = loss_of(saved, encode(tokenizer, [text.test], "cpu"))
    print(f"kept step {best}: held-out {held_out:.3f}, test {test:.3f} nats per token")
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    readme = f"""# Quickstart model

A Llama of {parameters:.2f} M parameters (6 blocks, hidden size 192, grouped queries, tied embeddings, sequences of
{LENGTH} tokens) with a byte-level BPE tokenizer of {VOCABULARY} tokens of its own. Small enough to be committed and
searched in minutes, trained well enough that its weight matrices have real spectra, and of no other use.

- **Text**: Python {text.python}: the first 80 % of `pydoc_data.topics` (the language reference) and the modules of the
  standard library without tests. Licence: PSF-2.0, © Python Software Foundation.
- **Licence** of the model: Apache-2.0, like the project.
- **Training**: {options.steps} steps of {options.batch} x {LENGTH} tokens, on one {where}.
- **Held-out loss**: {held_out:.3f} nats per token on the next 10 % of the topics. It picked the weights: step {best}.
- **Test loss**: {test:.3f} nats per token on the last 10 %, where the quickstart study validates. It picked nothing.

Made by

    python scripts/make_quickstart_model.py studies/quickstart/model --steps {options.steps} --batch {options.batch} \\
        --learning-rate {options.learning_rate:g} --seed {options.seed}
"""
    (options.out / "README.md").write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
