"""The command line: runs the chosen benchmarks, prints their pages and keeps them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cnn_step, comparison, mlp_step, peers, report, resnet_step, trainer_overhead, xla_step
from benchmarks.bars import PEERS, Bar
from benchmarks.floors import floor_of, measure_rates
from benchmarks.measure import CHECKED_STEPS, Disagreement, agree_in_float64, peak_memory, race
from benchmarks.plan import Choices, Plan
from benchmarks.results import Results

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {
    "mlp": mlp_step.plan,
    "xla": xla_step.plan,
    "cnn": cnn_step.plan,
    "comparison": comparison.plan,
    "resnet": resnet_step.plan,
    "trainer": trainer_overhead.plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run benchmarks; return 0 if the contestants agree and every bound holds."""
    options = _parse(arguments)
    gpu = report.gpu()
    choices = Choices(
        quick=options.quick,
        device="cpu" if gpu is None else "cuda",
        full=options.full,
        left_out=tuple(PEERS) if options.without_peers else (),
    )
    where = report.machine(options.threads, gpu)
    failed = False
    for name in options.only:
        try:
            failed |= not _run(name, BENCHMARKS[name](choices), options, where)
        except Disagreement as error:
            print(f"{name}: the contestants do not compute the same: {error}", file=sys.stderr)
            failed = True
    return int(failed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=[*BENCHMARKS], default=[*BENCHMARKS], help="which to run (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=25, help="paired rounds, at least 15 (default 25)")
    parser.add_argument("--threads", type=int, default=min(2, report.cores()), help="threads of each contestant")
    parser.add_argument(
        "--output", type=Path, help="folder for the results (default, unless --quick: results/ beside this file)"
    )
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, no bounds: a smoke run")
    parser.add_argument("--full", action="store_true", help="comparison: more numbers of models, own inputs (hours)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the races that an interrupted run has written"
    )
    parser.add_argument("--without-peers", action="store_true", help="leave out libraries that pip would download")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 2
    elif options.rounds < 15:
        parser.error(f"--rounds {options.rounds}: a median needs at least 15")
    elif options.output is None:
        options.output = RESULTS
    return options


def _run(name: str, plan: Plan, options: argparse.Namespace, where: Mapping[str, Any]) -> bool:
    """Whether all bounds hold."""
    for contestant, package in PEERS.items():
        if any(contestant in one.contestants for one in plan.races.values()):
            peers.install(package)
    rates = measure_rates(options.threads)
    _say(f"{rates.flops / 1e9:.0f} Gflop/s in a large product, {rates.bytes / 1e9:.0f} GB/s in a copy")
    floors = {key: floor_of(one.workload, rates) for key, one in plan.races.items()}
    results = Results({}, {}, rates, floors, {})
    if options.resume and options.output is not None:
        results.take_over(_data_file(name, options.output, where), plan.races, where, options.rounds)
    for key, one in plan.races.items():
        if key in results.timings:
            continue
        _say(str(one.workload))
        results.differences[key] = agree_in_float64(one.contestants, one.workload, options.threads)
        _say(f"all train the same weights in float64, up to {results.differences[key]:.0e}")
        own = one.shortened() if options.quick else one
        results.timings[key] = race(own, options.threads, rounds=options.rounds, say=_say)
        # At once: a later race may fail after an hour.
        _write(name, plan, options, where, results, [])
    if plan.large is not None and plan.measured_memory:
        _say(f"peak memory, {plan.large}")
        for who in plan.measured_memory:
            results.memory[who] = peak_memory(who, plan.large, options.threads)
    # The bounds are those of processors.
    bars = [] if options.quick or "gpu" in where else plan.bars(results)
    print(_write(name, plan, options, where, results, bars))
    missed = [bar.what for bar in bars if not bar.holds]
    if missed:
        print(f"{name}: bounds that do not hold: {len(missed)} of {len(bars)}", file=sys.stderr)
    return not missed


def _write(
    name: str, plan: Plan, options: argparse.Namespace, where: Mapping[str, Any], results: Results, bars: Sequence[Bar]
) -> str:
    """The results so far as a page, which is written with the data and the figure if there is a folder for them."""
    page = _page(plan.title, where, results, bars, quick=options.quick)
    if options.output is not None:
        path = _data_file(name, options.output, where)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.as_json(where, results, bars), indent=1) + "\n")
        path.with_suffix(".md").write_text(page + "\n")
        if plan.draw is not None:
            plan.draw(results, path.with_suffix(".svg"))
        _say(f"written to {path}")
    return page


def _data_file(benchmark: str, folder: Path, where: Mapping[str, Any]) -> Path:
    return folder / f"{file_name(benchmark, where.get('gpu'))}.json"


def file_name(benchmark: str, gpu: str | None) -> str:
    """Of the results, without suffix."""
    where = "" if gpu is None else "-" + re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"{benchmark}_step{where}"


def _page(title: str, where: Mapping[str, Any], results: Results, bars: Sequence[Bar], *, quick: bool) -> str:
    timings, memory = results.timings, results.memory
    rounds = len(next(iter(next(iter(timings.values())).seconds.values())))
    parts = [
        f"# {title}",
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items()),
        f"Medians of {rounds} paired rounds, with quartiles; each contestant in a process of its own, one at a time.",
    ]
    for key, one in timings.items():
        parts += [f"## {one.workload}", report.timings_table(key, results)]
        parts.append(
            f"Contestants differ by {results.differences[key]:.0e} in weights after {CHECKED_STEPS} steps in float64, "
            f"and by {one.loss_difference:.0e} in the losses of all timed steps. {report.floor_line(key, results)}"
        )
    if memory:
        large = next(iter(memory.values())).workload
        parts += [f"## Peak memory, {large}", report.memory_table(memory)]
    if quick:
        parts.append("A smoke run: its times mean nothing.")
    if bars:
        parts += ["## What must hold", report.bars_table(bars)]
    return "\n\n".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
