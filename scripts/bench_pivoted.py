"""How exactly pivoted storage holds a study's factors, and how much it saves.

    python scripts/bench_pivoted.py STUDY.toml [--kept 0.9 0.8 0.6 0.4] [--json FILE]

For every target layer at the closed form's ranks (of the study's own storage form): the largest coefficient, the
relative error of the layer's output on random inputs in float32, bfloat16 and float16 against float64, and the same
error in two-factor storage.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from _bench import print_table, write_report
from _run import run_script
from torch import Tensor, nn

from rank_search.compress.low_rank import LowRankLinear
from rank_search.compress.pivoted import PivotedLinear
from rank_search.preparing import Prepared, prepare
from rank_search.spec import load_study_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--kept", nargs="+", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    prepared = prepare(load_study_file(args.study))
    rows = [_row(prepared, kept) for kept in args.kept or prepared.spec.search.ladder]
    print_table(rows)
    write_report(args.json, prepared.device, prepared.spec.name, rows)


@torch.no_grad()
def _row(prepared: Prepared, kept: float) -> dict[str, object]:
    rank_map = prepared.allocator.closed_form(kept)
    growth = 0.0
    errors = {f"{form} {name}": 0.0 for name in DTYPES for form in ("pivoted", "two-factor")}
    for target in prepared.targets:
        if target.name not in rank_map:
            continue
        layer = LowRankLinear.of(prepared.bank[target.name], rank_map[target.name], target)
        pivoted = PivotedLinear.of(layer)
        growth = max(growth, pivoted.growth)
        x = torch.randn(64, target.shape.n, generator=torch.Generator().manual_seed(0)).to(prepared.device)
        exact = (x.double() @ layer.inner.weight.double().T) @ layer.outer.weight.double().T
        if layer.bias is not None:
            exact += layer.bias.double()
        for name, dtype in DTYPES.items():
            for form, module in (("two-factor", layer), ("pivoted", pivoted)):
                errors[f"{form} {name}"] = max(errors[f"{form} {name}"], _error(module, x, exact, dtype))
    space = prepared.space
    return {
        "kept_of_targets": kept,
        "two-factor params": space.with_storage("two-factor").target_params(rank_map),
        "pivoted params": space.with_storage("pivoted").target_params(rank_map),
        "worst growth": round(growth, 4),
        **{f"worst {name}": float(f"{error:.3g}") for name, error in errors.items()},
    }


def _error(module: nn.Module, x: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    rounded = copy.deepcopy(module).to(dtype)  # a copy: the next dtype rounds the float32 weights, not these
    return float((rounded(x.to(dtype)).double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    run_script(main)
