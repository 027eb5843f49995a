"""One training step of many small MLPs: ours, the alternatives, and what must hold between them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import peers, report
from benchmarks.bars import BY_HAND, EAGER, FUSED, PEER, Bar, bars_of_many, bars_of_memory, bars_of_one
from benchmarks.contestants import CONTESTANTS, ONE_RATE
from benchmarks.measure import CHECKED_STEPS, Disagreement, Memory, Timings, agree_in_float64, peak_memory, race
from benchmarks.workloads import MLPs

RESULTS = Path(__file__).parent / "results" / "mlp_step.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 if the contestants agree and every bound holds."""
    options = _parse(arguments)
    try:
        return _run(options)
    except Disagreement as error:
        print(f"The contestants do not compute the same: {error}", file=sys.stderr)
        return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mlp_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="paired rounds, at least 15 (default 25)")
    parser.add_argument("--threads", type=int, default=min(2, report.cores()), help="threads of each contestant")
    parser.add_argument(
        "--output", type=Path, help="JSON file; the tables go beside it (default, unless --quick: in results/)"
    )
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, no bounds: a smoke run")
    parser.add_argument("--without-peers", action="store_true", help="leave out libraries that pip would download")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 2
    elif options.rounds < 15:
        parser.error(f"--rounds {options.rounds}: a median needs at least 15")
    elif options.output is None:
        options.output = RESULTS
    return options


def _run(options: argparse.Namespace) -> int:
    where = report.machine(options.threads)
    many, large = MLPs(), MLPs(num_models=16, features=1024, hidden=1024, classes=1024, batch=16)
    if options.quick:
        many = replace(many, num_models=4, hidden=16)
        large = replace(large, num_models=4, hidden=64)
    everyone = [name for name in CONTESTANTS if name != PEER or not options.without_peers]
    if PEER in everyone:
        peers.install("modelbatch")
    # A smoke run compiles for the first race only.
    later = [name for name in everyone if not options.quick or "compiled" not in name]

    races = {
        "many": (everyone, many, 20),
        "sweep": (
            [name for name in later if name not in ONE_RATE],
            replace(many, lowest_rate=1e-4, highest_rate=1e-2),
            20,
        ),
        "one": (["loop", FUSED, EAGER], replace(many, num_models=1), 300),
    }
    timings, differences = {}, {}
    for key, (contestants, workload, steps) in races.items():
        _say(str(workload))
        differences[key] = agree_in_float64(contestants, workload, options.threads)
        _say(f"all train the same weights in float64, up to {differences[key]:.0e}")
        steps = 2 if options.quick else steps
        timings[key] = race(contestants, workload, options.threads, rounds=options.rounds, steps=steps, say=_say)
    memory: dict[str, Memory] = {}
    if sys.platform == "linux":
        _say(f"peak memory, {large}")
        memory = {name: peak_memory(name, large, options.threads) for name in later}

    bars: list[Bar] = []
    if not options.quick:
        bars = [*bars_of_many(timings["many"]), *bars_of_one(timings["one"]), *bars_of_memory(memory)]
    page = _page(where, differences, timings, memory, bars)
    print(page)
    if options.output is not None:
        results = report.as_json(where, differences, timings, memory, bars)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(page + "\n")
        _say(f"written to {options.output}")
    missed = [bar.what for bar in bars if not bar.holds]
    if missed:
        print(f"Bounds that do not hold: {len(missed)} of {len(bars)}", file=sys.stderr)
    return int(bool(missed))


def _page(
    where: Mapping[str, Any],
    differences: Mapping[str, float],
    timings: Mapping[str, Timings],
    memory: Mapping[str, Memory],
    bars: Sequence[Bar],
) -> str:
    rounds = len(next(iter(timings["many"].seconds.values())))
    parts = [
        "# One training step of many MLPs",
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items()),
        f"Medians of {rounds} paired rounds, with quartiles; each contestant in a process of its own, one at a time.",
    ]
    for key, one in timings.items():
        references = [name for name in ("loop", PEER) if name in one.seconds]
        parts += [f"## {one.workload}", report.timings_table(one, references)]
        parts.append(
            f"Contestants differ by {differences[key]:.0e} in weights after {CHECKED_STEPS} steps in float64, "
            f"and by {one.loss_difference:.0e} in the losses of all timed steps."
        )
    if memory:
        large = next(iter(memory.values())).workload
        parts += [f"## Peak memory, {large}", report.memory_table(memory)]
    if not bars:
        parts.append("A smoke run: its times mean nothing.")
    else:
        by_hand = timings["many"].fastest([name for name in BY_HAND if name in timings["many"].seconds])
        parts += ["## What must hold", report.bars_table(bars), f"By hand is the fastest of three: {by_hand}."]
    return "\n\n".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
