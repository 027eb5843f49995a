"""Runs every entry of PyTorch's table in several processes and writes the results next to this file."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

# Before torch and JAX are imported, which read them once: the processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import torch
from tqdm import tqdm

from tests.opinfo.samples import COMPARED, FORM_ONLY, PARTLY, PASSED, Outcome, check, entries, lists

_EXCLUDED = "excluded"
_ROWS = {
    COMPARED: "outputs and gradients compared",
    PARTLY: "the same, but some samples are refused",
    FORM_ONLY: "shapes and dtypes only (random numbers, memory as it is)",
    _EXCLUDED: "excluded, each with a reason",
}


def _named(name: str) -> tuple[str, Outcome]:
    torch.set_num_threads(1)
    return name, check(name)


def _run(names: list[str]) -> dict[str, Outcome]:
    # A fresh process each: JAX cannot be forked, and compiled programs are freed now and then.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=100) as pool:
        return dict(tqdm(pool.imap_unordered(_named, names), total=len(names), desc="entries"))


def _mistakes(outcomes: dict[str, Outcome]) -> list[str]:
    """Entries that do not come out as the lists say."""
    mistakes = []
    for name, outcome in sorted(outcomes.items()):
        if name in lists()["excluded"]:
            if outcome.status in PASSED:
                mistakes.append(f"{name} is excluded but works")
        elif outcome.status not in PASSED:
            mistakes.append(f"{name}: {outcome.status}: {outcome.detail}")
        elif name in lists()["partly"] and outcome.status == COMPARED:
            mistakes.append(f"{name} is listed as compared in part, but no sample was refused")
    return mistakes + [f"{name} is no entry" for own in lists().values() for name in own if name not in outcomes]


def _results(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    excluded = lists()["excluded"]
    statuses = {name: _EXCLUDED if name in excluded else outcome.status for name, outcome in sorted(outcomes.items())}
    groups = {"nn.functional": [name for name in statuses if name.startswith("nn.functional.")]}
    groups |= {"others": [name for name in statuses if name not in groups["nn.functional"]], "all": list(statuses)}
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "jax": jax.__version__},
        "counts": {
            group: {**dict.fromkeys(_ROWS, 0), **Counter(statuses[name] for name in names), "entries": len(names)}
            for group, names in groups.items()
        },
        "entries": {
            name: {"status": status, "samples": outcomes[name].samples}
            | ({"reason": excluded[name]} if name in excluded else {})
            for name, status in statuses.items()
        },
    }


def _table(results: dict[str, Any]) -> str:
    counts, versions = results["counts"], results["versions"]
    lines = [
        f"Entries of PyTorch's OpInfo table, up to 3 samples each, float32 samples judged in float64 within 1e-9 "
        f"(torch {versions['torch']}, jax {versions['jax']}, CPU). Reasons: [excluded.toml](excluded.toml).",
        "",
        "| | nn.functional | others | all |",
        "|---|--:|--:|--:|",
    ]
    for row, text in {**_ROWS, "entries": "entries"}.items():
        lines.append(f"| {text} | {' | '.join(str(own[row]) for own in counts.values())} |")
    shares = [(own[COMPARED] + own[PARTLY]) / own["entries"] for own in counts.values()]
    lines.append(f"| **compared** | {' | '.join(f'**{share:.1%}**' for share in shares)} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    """Run all entries, or only print what becomes of some; 1 if any does not come out as the lists say."""
    if names:
        for name in names:
            print(name, *_named(name)[1])
        return 0
    outcomes = _run(list(entries()))
    results = _results(outcomes)
    own = Path(__file__).parent
    own.joinpath("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    own.joinpath("results.md").write_text(_table(results), encoding="utf-8")
    print(_table(results))
    mistakes = _mistakes(outcomes)
    print(*mistakes, sep="\n")
    return 1 if mistakes else 0
