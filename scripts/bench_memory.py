"""Peak memory of preparing a model, step by step: by arithmetic, and as measured on random weights.

    python scripts/bench_memory.py plan [--layers 32 ...] [--statistics-memory GIB]
    python scripts/bench_memory.py run FOLDER [--layers 32 ...] [--statistics-memory GIB ...] [--json FILE]

The first form computes; nothing of the size of the model is made. The second one makes a Llama of random weights in
FOLDER (once; in bfloat16, on the GPU where there is one), and prepares a study on it in a process of its own for each
of the GIB (`all`: everything at once; `default`: what the package chooses). Every step is shown with the most that it
held on the GPU and on the host; host memory is what belongs to the process alone, without pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _bench import environment, print_table
from _run import run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rank_search.factors.decompose import NEEDS
from rank_search.factors.groups import in_groups, units
from rank_search.factors.statistics import input_owners
from rank_search.model.device import free_memory, resolve_device
from rank_search.model.targets import Target, find_targets
from rank_search.preparing import prepare
from rank_search.progress import Progress, Step
from rank_search.spec import StudyFile, TargetSpec, parse_study
from rank_search.task import Examples

GIB = 2**30
_OWN = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = parser.add_subparsers(dest="form", required=True)
    for name in ("plan", "run"):
        form = forms.add_parser(name)
        if name == "run":
            form.add_argument("folder", type=Path)
            form.add_argument("--statistics-memory", nargs="+", default=["default"])
            form.add_argument("--json", type=Path)
            form.add_argument("--blocks", type=int, default=64, help="calibration blocks")
            form.add_argument("--batch", type=int, default=1, help="blocks in a calibration batch")
            form.add_argument("--gpu-memory", type=float, help="GiB: the GPU's allocator gives no more")
        else:
            form.add_argument("--statistics-memory", type=float, default=18.0)
        form.add_argument("--storage", default="pivoted", choices=("pivoted", "two-factor"))
        form.add_argument("--anchor", type=float, default=0.8)
        for key, default in (("layers", 32), ("hidden", 4096), ("intermediate", 11008), ("heads", 32),
                             ("kv-heads", 32), ("vocabulary", 32000), ("length", 2048)):  # fmt: skip
            form.add_argument(f"--{key}", type=int, default=default)
    args = parser.parse_args()
    if args.form == "plan":
        print_table(plan(args))
        return
    if args.gpu_memory is not None and {"default", "all"} & {*args.statistics_memory}:
        parser.error("--gpu-memory needs --statistics-memory in GiB: shares are taken of the whole GPU's memory")
    spawn = multiprocessing.get_context("spawn")  # fresh processes: what one has held says nothing about the next
    _in_process(spawn, make_model, args)
    report: list[dict[str, Any]] = []
    for memory in args.statistics_memory:
        rows, seconds = _in_process(spawn, measure, args, memory)
        print(f"statistics memory: {memory}")
        print_table(rows)
        report.append({"statistics_memory": memory, "gpu_memory": args.gpu_memory, "seconds": seconds, "steps": rows})
    shape = {key: getattr(args, key) for key in ("layers", "hidden", "intermediate", "vocabulary", "length", "blocks")}
    if args.json:
        told = {"environment": environment(resolve_device("auto")), "model": shape, "runs": report}
        args.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _in_process(context: Any, work: Any, *arguments: Any) -> Any:
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def _config(args: argparse.Namespace) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.length, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def make_model(args: argparse.Namespace) -> None:
    """Random weights and a tokenizer of bytes in FOLDER/model; what is there stays if it has the same shape."""
    folder = args.folder / "model"
    config = _config(args)
    known = folder / "made.json"
    if known.exists() and known.read_text(encoding="utf-8") == config.to_json_string():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    device = resolve_device("auto")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    backend = Tokenizer(models.BPE({sign: at for at, sign in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    known.write_text(config.to_json_string(), encoding="utf-8")


@dataclass
class Peaks(Progress):
    """Notes what every step holds at most; steps of one title count together."""

    device: torch.device
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    _now: str = "start"
    _host: int = 0

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        self.change_to(title)
        yield self
        self.change_to(f"after {title}")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._host = max(self._host, _own_memory())

    def say(self, message: str) -> None:
        print(message)

    def watch(self) -> None:
        """Look at the host's memory over and over."""
        while True:
            self._host = max(self._host, _own_memory())
            time.sleep(0.01)

    def change_to(self, title: str) -> None:
        """Book what the step until now has held."""
        row = self.rows.setdefault(self._now, {"times": 0, "gpu_gib": 0.0, "host_gib": 0.0})
        row["times"] += 1
        row["host_gib"] = max(row["host_gib"], self._host / GIB)
        if self.device.type == "cuda":
            row["gpu_gib"] = max(row["gpu_gib"], torch.cuda.max_memory_allocated(self.device) / GIB)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._now, self._host = title, _own_memory()


def _own_memory() -> int:
    found = _OWN.search(Path("/proc/self/status").read_text(encoding="ascii"))
    return 1024 * int(found[1]) if found else 0


def measure(args: argparse.Namespace, memory: str) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Prepare a study on the model; a row for every step, and the seconds of each."""
    work = args.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    blocks = {"calibration_blocks": args.blocks, "train_blocks": 8, "validation_blocks": 8}
    run: dict[str, object] = {"work_dir": str(work.resolve()), "calibration_batch_blocks": args.batch}
    if memory != "default":
        run["statistics_memory"] = 1e6 if memory == "all" else float(memory)
    tables = {
        "name": "memory", "model": {"source": str((args.folder / "model").resolve())},
        "data": {"sequence_length": args.length, **blocks}, "targets": {"storage": args.storage},
        "factors": {"anchor": args.anchor}, "run": run,
    }  # fmt: skip
    device = resolve_device("auto")
    if args.gpu_memory is not None:
        whole_gpu = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.gpu_memory * GIB / whole_gpu, device)
    peaks = Peaks(device)
    threading.Thread(target=peaks.watch, daemon=True).start()
    started = time.perf_counter()
    prepared = prepare(StudyFile(spec=parse_study(tables, where="the benchmark"), folder=args.folder), progress=peaks)
    peaks.change_to("end")
    seconds = {name: round(value, 1) for name, value in asdict(prepared.times).items()}
    free = free_memory(device) / GIB
    if args.gpu_memory is not None:
        free = min(free, args.gpu_memory - torch.cuda.memory_allocated(device) / GIB)
    print(f"{time.perf_counter() - started:.1f} s: {seconds}; free for a trial: {free:.1f} GiB")
    whole = {
        "times": 1, "gpu_gib": max(row["gpu_gib"] for row in peaks.rows.values()),
        "host_gib": max(row["host_gib"] for row in peaks.rows.values()),
    }  # fmt: skip
    return [{"step": title, **row} for title, row in {**peaks.rows, "all": whole}.items()], seconds


def plan(args: argparse.Namespace) -> list[dict[str, object]]:
    """What the steps hold by arithmetic, in GiB, on top of activations and the libraries themselves."""
    with torch.device("meta"):
        model = LlamaForCausalLM(_config(args))
    targets = find_targets(model, TargetSpec())
    needs = NEEDS["kfac"]
    every = units(targets, needs, _owners(args.layers))
    collections = 2 if args.anchor < 1 else 1
    limit = int(args.statistics_memory * GIB)
    first, second = in_groups(every, limit), in_groups(every, limit // collections)
    held = {id(unit.targets[0]): unit.nbytes for unit in every}

    def most(groups: tuple[tuple[Target, ...], ...]) -> int:
        return max(sum(held.get(id(target), 0) for target in group) for group in groups)

    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    matrices = 4 * sum(target.shape.dense_params for target in targets)
    factors = 4 * sum(t.shape.max_rank(args.storage) * (t.shape.m + t.shape.n) for t in targets)
    largest = max(max(t.shape.m, t.shape.n) for t in targets)
    product = 12 * largest**2  # in float32, then in float64
    side, other = max((max(t.shape.m, t.shape.n), min(t.shape.m, t.shape.n)) for t in targets)
    # The damped matrix and its root; W, Rᵀ W and M; the Gram matrix, its vectors and the routine's own copies.
    one = 8 * (2 * side**2 + 3 * side * other + 4 * other**2)
    slopes = 8 * max(sum(t.shape.dense_params for t in group) for group in second)
    rows = [
        ("load", 1, weights, weights),
        ("statistics, first round", len(first), weights + most(first) + product, factors),
        ("decomposition, first round", len(first), weights + most(first) + one, factors),
        ("exchange of models", 2 * len(second), weights, max(factors, matrices)),
        ("slopes", len(second), weights + most(second) + slopes, matrices),
        ("statistics, second round", 2 * len(second), weights + 2 * most(second) + product, matrices),
        ("decomposition, second round", len(second), weights + most(second) + one, matrices),
    ]
    if collections == 1:
        rows = [("load", 1, weights, weights), *((title, times, gpu, 0) for title, times, gpu, _ in rows[1:3])]
    whole = sum(unit.nbytes for unit in every)
    print(
        f"{weights / 4e9:.2f} G parameters; statistics of all target layers {whole / GIB:.1f} GiB, "
        f"factor bank {factors / GIB:.1f} GiB on the disk"
    )
    return [
        {"step": title, "times": times, "gpu_gib": round(gpu / GIB, 1), "host_gib": round(host / GIB, 1)}
        for title, times, gpu, host in rows
    ]


def _owners(layers: int) -> dict[str, str]:
    """Which layers of a Llama read one input, told by a tiny one of as many blocks."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return input_owners(model, find_targets(model, TargetSpec()), Examples.causal(torch.zeros(1, 4, dtype=torch.int32)))


if __name__ == "__main__":
    run_script(main)
