"""Executors: found by name, local child processes, dry runs."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.arch.repository import ROOT
from tests.experiments import base_config, make_project
from tests.training_runs import run as training_run
from trainers.config import ConfigurationError, ConfigurationManager, create_experiment_config
from trainers.config.schema import LoggingConfig
from trainers.searches import executors, progress
from trainers.searches.dry_run_executor import DryRunExecutor
from trainers.searches.executors import INTERRUPTED_EXIT_CODE, Job, MissingExecutor, MissingScript, Outcome, Plan
from trainers.searches.folder import GridFolder
from trainers.searches.local_executor import GRACE_SECONDS, LocalExecutor

MakePlan = Callable[..., Plan]


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    def make(script: str, names: str = "a b", folder: str = "project", **settings: Any) -> Plan:
        root = make_project(tmp_path / folder, script)
        output = root / "experiments" / "out"
        jobs = []
        for index, name in enumerate(names.split()):
            config = create_experiment_config(base_config(experiment_name=name))
            jobs.append(Job(index, name, config, output / name))
            jobs[-1].folder.mkdir(parents=True)
            jobs[-1].config_path.write_text("seed: 1\n")
        return Plan(tuple(jobs), root / "scripts" / "train.py", root, output, **settings)

    return make


def run_local(plan: Plan) -> list[Outcome]:
    executor = LocalExecutor()
    executor.check(plan)
    return sorted(executor.run(plan), key=lambda outcome: outcome.job.index)


def record(job: Job) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(job.record_path.read_text())
    return content


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("folder", ["project", "with space; $(touch oops) 'é\"&"])
def test_each_child_gets_its_arguments_without_a_shell(make_plan: MakePlan, folder: str) -> None:
    plan = make_plan(
        "import json, os\nprint('out'); print('err', file=sys.stderr)\n"
        "(folder / 'seen.json').write_text(json.dumps([options, os.getcwd()]))",
        folder=folder,
    )
    assert [(outcome.job_id, outcome.error) for outcome in run_local(plan)] == [("local-0", None), ("local-1", None)]
    for job in plan.jobs:
        options, directory = json.loads((job.folder / "seen.json").read_text())
        assert options == {
            "--config": str(job.config_path),
            "--experiment-name": job.name,
            "--output-dir": str(job.folder),
        }
        assert directory == str(plan.project_root)
        assert (job.folder / f"local-{job.index}.out").read_text() == "out\n"
        assert (job.folder / f"local-{job.index}.err").read_text() == "err\n"
        expected = {"executor": "local", "job_id": f"local-{job.index}", "state": "COMPLETED", "exit_code": 0}
        assert record(job).items() >= {**expected, "config_hash": job.config_hash()}.items()
    assert not list(plan.project_root.parent.rglob("oops*"))


def test_a_failing_child_is_recorded_and_the_others_go_on(
    make_plan: MakePlan, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(
        "import os\nname = options['--experiment-name']\n"
        "if name == 'bad': print('first', file=sys.stderr); raise SystemExit('no data\\n')\n"
        "if name == 'code': sys.exit(7)\n"
        "if name == 'killed': os.kill(os.getpid(), 9)",
        names="bad good code killed last",
    )
    with caplog.at_level(logging.INFO, "trainers"):
        bad, good, code, killed, last = run_local(plan)
    assert (good.job_id, last.job_id) == ("local-1", "local-4")
    assert bad.job_id is code.job_id is killed.job_id is None
    assert bad.error is not None
    assert bad.error.startswith("exit code 1; output in ")
    assert bad.error.endswith("last line: no data")
    assert "exit code 7" in str(code.error)
    assert "killed by SIGKILL" in str(killed.error)
    assert [record(job)["exit_code"] for job in plan.jobs] == [1, 0, 7, -9, 0]
    assert [record(job)["state"] for job in plan.jobs] == ["FAILED", "COMPLETED", "FAILED", "FAILED", "COMPLETED"]
    assert len(caplog.messages) == 5
    assert re.match(r"1 of 5, 1 failed, about \d\d:\d\d left: bad failed: exit code 1", caplog.messages[0])
    assert caplog.messages[-1] == "5 of 5, 3 failed: last is complete"
    folders = [job.folder for job in plan.jobs]
    assert LocalExecutor().settled(folders) == executors.settled_folders(folders) == {folders[1], folders[4]}


ALONE = """
import os, time
marker = folder.parent / "somebody-runs"
os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
time.sleep(0.05)
marker.unlink()
"""
# Each waits until so many others run: it ends only if they run at the same time.
TOGETHER = """
import time
(folder.parent / f"started-{folder.name}").touch()
while len(list(folder.parent.glob("started-*"))) < 2:
    time.sleep(0.01)
"""


def test_one_at_a_time_by_default(make_plan: MakePlan) -> None:
    assert [outcome.error for outcome in run_local(make_plan(ALONE, "a b c"))] == [None] * 3


def test_more_at_a_time_on_request_and_no_more_than_that(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: list[int] = []
    running: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def counted(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        running.append(start(*arguments, **keywords))
        at_once.append(sum(process.returncode is None for process in running))
        return running[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    plan = make_plan(TOGETHER, "a b c d", max_concurrent_jobs=2)
    assert [outcome.error for outcome in run_local(plan)] == [None] * 4
    assert max(at_once) == 2


def test_a_child_that_cannot_be_started_is_a_failure_of_its_own(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("")
    monkeypatch.setattr(
        Plan, "_command", lambda self, job: ["no-such-program"] if job.name == "a" else [sys.executable, "-c", ""]
    )
    first, second = run_local(plan)
    assert "could not be started" in str(first.error)
    assert second.job_id == "local-1"
    assert [record(job)["state"] for job in plan.jobs] == ["FAILED", "COMPLETED"]


@pytest.mark.parametrize("rest", ["pass", "folder.mkdir()", "folder.write_text('no folder')"])
def test_a_child_that_removes_its_folder_fails_alone(rest: str, make_plan: MakePlan) -> None:
    plan = make_plan(f"import shutil\nif folder.name == 'a': shutil.rmtree(folder); {rest}; sys.exit(3)")
    first, second = run_local(plan)
    assert re.match("its end cannot be written" if "text" in rest else "exit code 3", str(first.error))
    assert second.job_id == "local-1"


def test_an_interrupted_script_is_run_again(make_plan: MakePlan) -> None:
    plan = make_plan(f"if folder.name == 'a': sys.exit({INTERRUPTED_EXIT_CODE})")
    first, _ = run_local(plan)
    assert (first.job_id, first.error) == (None, "interrupted; a rerun goes on where it was")
    assert [record(job)["state"] for job in plan.jobs] == ["INTERRUPTED", "COMPLETED"]
    folders = [job.folder for job in plan.jobs]
    assert executors.settled_folders(folders) == {folders[1]}


def test_a_script_may_write_any_file(make_plan: MakePlan) -> None:
    """Files of a pack have no meaning beside a script."""
    plan = make_plan("print((folder / 'outcome.json').read_text())", "a")
    path = plan.jobs[0].folder / "outcome.json"
    path.write_text("mine")
    assert [outcome.error for outcome in run_local(plan)] == [None]
    path.write_text('{"a": {"state": "FAILED", "error": "mine"}}')
    assert [outcome.error for outcome in run_local(plan)] == [None]
    assert path.exists()


# Stands for a process that runs a pack: `experiments` are those of the pack, `say(states)` writes what became of them.
PACK = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
experiments = json.loads((folder / "pack.json").read_text())["experiments"]
def say(states):
    content = {name: {"state": state, "error": "why" if state == "FAILED" else None} for name, state in states.items()}
    (folder / "outcome.tmp").write_text(json.dumps(content))
    (folder / "outcome.tmp").rename(folder / "outcome.json")
"""


@pytest.fixture
def make_packs(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    def make(script: str, names: str, **settings: Any) -> Plan:
        monkeypatch.setattr(executors, "pack_command", lambda folder: [sys.executable, "-c", PACK + script, folder])
        plan = make_plan("", names, build="module:function", **settings)
        for path, content in plan.pack_contents().items():
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
        return plan

    return make


def test_each_experiment_of_a_pack_has_an_end_of_its_own(make_packs: MakePlan) -> None:
    plan = make_packs("say({'a': 'COMPLETED', 'b': 'FAILED', 'c': 'INTERRUPTED'})", "a b c d")
    outcomes = run_local(plan)
    (task,) = plan.tasks()
    interrupted = "interrupted; a rerun goes on where it was"
    assert [outcome.error for outcome in outcomes] == [
        None,
        f"why; output in {task.folder / 'local.err'}",
        interrupted,
        interrupted,
    ]
    assert [outcome.job_id for outcome in outcomes] == ["local-0", None, None, None]
    assert [record(job)["state"] for job in plan.jobs] == ["COMPLETED", "FAILED", "INTERRUPTED", "INTERRUPTED"]
    folders = [job.folder for job in plan.jobs]
    assert executors.settled_folders(folders) == {folders[0]}


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("sys.exit('no build')", "exit code 1; output in .*; last line: no build"),
        ("", "interrupted"),
        ("(folder / 'outcome.json').write_text('{')", "interrupted"),
    ],
)
def test_a_pack_that_says_nothing_is_not_complete(make_packs: MakePlan, script: str, error: str) -> None:
    plan = make_packs(script, "a b")
    # What an earlier process said is forgotten.
    said = {job.name: {"state": "COMPLETED", "error": None} for job in plan.jobs}
    (plan.tasks()[0].folder / "outcome.json").write_text(json.dumps(said))
    for outcome in run_local(plan):
        assert re.match(error, str(outcome.error))
    assert {record(job)["state"] for job in plan.jobs} == {"INTERRUPTED" if error == "interrupted" else "FAILED"}


def test_what_was_complete_before_a_pack_died_stays_so(make_packs: MakePlan) -> None:
    plan = make_packs("say({'a': 'COMPLETED', 'b': 'INTERRUPTED'}); os.kill(os.getpid(), 9)", "a b")
    first, second = run_local(plan)
    assert (first.job_id, first.error) == ("local-0", None)
    assert str(second.error).startswith("killed by SIGKILL")
    assert [record(job)["state"] for job in plan.jobs] == ["COMPLETED", "FAILED"]
    assert [record(job)["exit_code"] for job in plan.jobs] == [-9, -9]


def dying(names: str, how: str) -> str:
    """A pack that dies, when it comes to one of these experiments, with what is left to be done."""
    return (
        f"guilty = {names.split()}\n"
        "states = dict.fromkeys(experiments, 'INTERRUPTED')\nsay(states)\n"
        "for name in experiments:\n"
        f"    if name in guilty: print('oh', file=sys.stderr); {how}\n"
        "    states[name] = 'COMPLETED'\n"
        "say(states)\n"
    )


def ended_by(number: int) -> str:
    """A pack that somebody ends; what starts these tests may have it ignore the signal."""
    return f"import signal\nsignal.signal({number:d}, signal.SIG_DFL)\n" + dying(
        "a", f"os.kill(os.getpid(), {number:d})"
    )


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_a_pack_that_dies_is_tried_again_in_halves(
    how: str, make_packs: MakePlan, caplog: pytest.LogCaptureFixture
) -> None:
    names = "a b c d e f g h"
    plan = make_packs(dying("c h", how), names)
    outcomes = run_local(plan)
    assert [outcome.job.name for outcome in outcomes if outcome.error is not None] == ["c", "h"]
    assert len(outcomes) == 8
    assert [record(job)["state"] for job in plan.jobs] == [
        "FAILED" if job.name in "ch" else "COMPLETED" for job in plan.jobs
    ]
    assert "a pack of 8 experiments died" in caplog.text
    assert "tried again in halves" in caplog.text


@pytest.mark.parametrize(
    "script",
    [
        *map(ended_by, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
        "sys.exit(1)",  # it never began
        "say(dict.fromkeys(experiments, 'FAILED')); sys.exit(1)",  # all failed of one cause
    ],
)
def test_a_pack_that_did_not_die_of_an_experiment_is_not_tried_again(script: str, make_packs: MakePlan) -> None:
    plan = make_packs(script, "a b")
    assert all(outcome.error is not None for outcome in run_local(plan))
    assert len(list(plan.output_dir.glob("packs/*"))) == 1


def test_a_pack_whose_halves_cannot_be_written_is_not_tried_again(
    make_packs: MakePlan, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_packs(dying("a", "os._exit(3)"), "a b")
    plan.pack_task(plan.jobs[1:]).folder.touch()
    assert [str(outcome.error).partition(";")[0] for outcome in run_local(plan)] == ["exit code 3"] * 2
    assert "experiments cannot be tried again" in caplog.text


def test_one_cause_is_explained_once(make_plan: MakePlan, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_plan("sys.exit('no data') if options['--experiment-name'] != 'c' else 0", names="a b c d e")
    with caplog.at_level(logging.INFO, "trainers"):
        outcomes = run_local(plan)
    errors = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "a failed: exit code 1; output in" in errors[0].getMessage()
    assert errors[1].getMessage() == (
        "4 experiments (a, b, d, ...) failed of one cause: exit code 1; last line: no data"
    )
    assert re.search(r"2 of 5, 2 failed, about .* left: b failed like a", caplog.text)
    # What each result says stays whole.
    assert [str(outcome.error).count("output in") for outcome in outcomes] == [1, 1, 0, 1, 1]


def test_experiments_of_a_pack_that_end_alike_are_one_line(
    make_packs: MakePlan, caplog: pytest.LogCaptureFixture
) -> None:
    script = "say({name: 'FAILED' if name < 'e' else 'COMPLETED' for name in experiments})"
    with caplog.at_level(logging.INFO, "trainers"):
        run_local(make_packs(script, "a b c d e f"))
    complete, failed = caplog.messages
    assert complete == "6 of 6, 4 failed: e, f are complete"
    assert failed.startswith("6 of 6, 4 failed: 4 experiments (a, b, c, ...) failed: why; output in ")


def test_what_was_complete_before_a_pack_was_stopped_stays_so(
    make_packs: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_packs("say({'a': 'COMPLETED', 'b': 'INTERRUPTED'}); time.sleep(60)", "a b")
    said = plan.tasks()[0].folder / "outcome.json"
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        """While the executor waits for its child, and the child has said something."""
        sleep(seconds)
        if said.exists():
            monkeypatch.setattr(time, "sleep", sleep)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(LocalExecutor().run(plan))
    assert [record(job)["state"] for job in plan.jobs] == ["COMPLETED", "CANCELLED"]


def test_packs_count_as_one_at_a_time(make_packs: MakePlan) -> None:
    alone = (
        "marker = folder.parent / 'somebody-runs'\nos.close(os.open(marker, os.O_CREAT | os.O_EXCL))\n"
        "time.sleep(0.05)\nmarker.unlink()\nsay({name: 'COMPLETED' for name in experiments})"
    )
    assert [outcome.error for outcome in run_local(make_packs(alone, "a b c d e", pack_size=2))] == [None] * 5


def test_packs_run_at_the_same_time_on_request(make_packs: MakePlan) -> None:
    together = (
        "(folder / 'started').touch()\n"
        "while len(list(folder.parent.glob('*/started'))) < 2: time.sleep(0.01)\n"
        "say({name: 'COMPLETED' for name in experiments})"
    )
    plan = make_packs(together, "a b c d", pack_size=2, max_concurrent_jobs=3)
    assert [outcome.error for outcome in run_local(plan)] == [None] * 4
    # They share the free memory.
    assert [record(job)["command"][-2:] for job in plan.jobs] == [["--packs-at-once", "2"]] * 4


def test_output_of_an_earlier_run_is_kept(make_plan: MakePlan) -> None:
    plan = make_plan("print('again')", "a")
    run_local(plan)
    run_local(plan)
    assert (plan.jobs[0].folder / "local-0.out").read_text() == "again\nagain\n"


LINES = """
import sys
from pathlib import Path
from tests.experiments import base_config, grid_of
from trainers.config import ExecutionMode
from trainers.searches.framework import ModelTrainingFramework
print(ModelTrainingFramework(sys.argv[1]).run_grid_search(
    [grid_of({"seed": [1, 2]})], base_config(), execution_mode=ExecutionMode.LOCAL, output_dir=Path(sys.argv[1]) / "out"
))
"""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_program_without_logging_shows_how_far_it_is(tmp_path: Path, is_terminal: bool) -> None:
    root = make_project(tmp_path / "project", "if 'seed: 2' in open(options['--config']).read(): sys.exit('no data')")
    path = os.pathsep.join([str(ROOT), str(ROOT / "compat")])
    ours, theirs = os.openpty() if is_terminal else os.pipe()
    if is_terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", LINES, str(root)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    os.close(theirs)
    shown = ""
    with suppress(OSError), open(ours, "rb", buffering=0) as stream:  # a terminal has no end, but an error
        while part := stream.read(4096):
            shown += part.decode()
    assert done.returncode == 0, shown
    assert len(done.stdout) < 300
    assert re.search(r"2 of 2, 1 failed: run_\w+ failed: exit code 1", shown)
    assert ("1 of 2, about" in shown) is not is_terminal
    assert ("2/2" in shown) is is_terminal


def test_the_epoch_of_what_runs_is_told(
    make_packs: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_IN_LOG", 0.0)
    messages = tmp_path / "messages.txt"
    training_run(tmp_path / "run", max_epochs=2, logging=LoggingConfig(log_file=str(messages), console_log=False))
    caplog.clear()
    script = (
        f"print(Path({str(messages)!r}).read_text(), file=sys.stderr, flush=True)\n"
        "time.sleep(0.5)\nsay(dict.fromkeys(experiments, 'COMPLETED'))"
    )
    plan = make_packs(script, "a b")
    # Of an earlier run.
    (plan.tasks()[0].folder / "local.err").write_text("epoch 2: loss 0.25\n")
    with caplog.at_level(logging.INFO, "trainers"):
        run_local(plan)
    assert set(caplog.messages[:-1]) == {"0 of 2: epoch 2 of 3"}
    assert caplog.messages[-1] == "2 of 2: a, b are complete"


def test_nothing_is_drawn_without_a_terminal(make_plan: MakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    run_local(make_plan("print('loud')"))
    assert capsys.readouterr() == ("", "")


def test_missing_script_is_one_error_before_the_start(make_plan: MakePlan) -> None:
    plan = make_plan("")
    gone = replace(plan, script_path=plan.script_path.with_name("gone.py"))
    with pytest.raises(FileNotFoundError, match=r"script_path: received .*gone\.py, which does not exist"):
        LocalExecutor().check(gone)
    assert issubclass(MissingScript, ConfigurationError)


def test_closing_early_ends_the_children(make_plan: MakePlan) -> None:
    plan = make_plan("import time\nif folder.name != 'a': time.sleep(60)", "a b c", max_concurrent_jobs=2)
    running = LocalExecutor().run(plan)
    assert next(running).job.name == "a"
    running.close()
    assert record(plan.jobs[1])["state"] == "CANCELLED"
    assert record(plan.jobs[1])["exit_code"] == -signal.SIGTERM
    assert not plan.jobs[2].record_path.exists()


def test_a_child_that_was_complete_when_the_others_were_ended_stays_complete(make_plan: MakePlan) -> None:
    plan = make_plan(
        "import os, time\n(folder / 'pid').write_text(str(os.getpid()))\n"
        "while folder.name == 'b' and not (folder / 'go').exists(): time.sleep(0.01)",
        max_concurrent_jobs=2,
    )
    running = LocalExecutor().run(plan)
    assert next(running).job.name == "a"
    second = plan.jobs[1].folder
    wait_for(lambda: (second / "pid").exists() and (second / "pid").read_text() != "")
    (second / "go").touch()
    wait_for(lambda: not is_alive(int((second / "pid").read_text())))
    running.close()
    assert record(plan.jobs[1])["state"] == "COMPLETED"


INTERRUPTED = """
import sys
from pathlib import Path
from tests.experiments import base_config, grid_of
from trainers.config import ExecutionMode
from trainers.searches.framework import ModelTrainingFramework
ModelTrainingFramework(sys.argv[1]).run_grid_search(
    [grid_of({"seed": [1, 2, 3]})], base_config(), execution_mode=ExecutionMode.LOCAL, max_concurrent_jobs=2,
    output_dir=Path(sys.argv[1]) / "out",
)
"""
# One child with a child of its own; deaf to SIGTERM where the test wants it.
SLEEPING = """
import os, signal, subprocess, time
if {deaf}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / "pids.tmp").write_text(f"{{os.getpid()}} {{own.pid}}")
(folder / "pids.tmp").rename(folder / "pids")
time.sleep(60)
"""


@contextmanager
def started_search(root: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A grid search in a process of its own, when two experiments run, and the processes below it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "compat")])
    command = [sys.executable, "-c", INTERRUPTED, str(root)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE) as parent:
        wait_for(lambda: parent.poll() is not None or len(list((root / "out").glob("*/pids"))) == 2)
        children = [int(pid) for file in (root / "out").glob("*/pids") for pid in file.read_text().split()]
        try:
            assert len(children) == 4
            assert all(is_alive(child) for child in children)
            yield parent, children
        finally:
            for process in [parent.pid, *children]:
                if is_alive(process):
                    os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize(
    ("signals", "deaf", "exit_code"),
    [
        ([signal.SIGINT], False, -signal.SIGINT),
        ([signal.SIGTERM], False, 128 + signal.SIGTERM),
        ([signal.SIGINT, signal.SIGINT], True, -signal.SIGINT),
    ],
)
def test_interrupting_ends_the_children(tmp_path: Path, signals: list[int], deaf: bool, exit_code: int) -> None:
    root = make_project(tmp_path / "project", SLEEPING.format(deaf=deaf))
    with started_search(root) as (parent, children):
        for number in signals:
            parent.send_signal(number)
            time.sleep(0.2)
        _, errors = parent.communicate(timeout=GRACE_SECONDS / 2)
        wait_for(lambda: not any(is_alive(child) for child in children))
    assert parent.returncode == exit_code, errors.decode()
    records = [json.loads(file.read_text()) for file in (root / "out").glob("*/job.json")]
    assert [record["state"] for record in records] == ["CANCELLED"] * 2
    told = f"0 of 3 experiments are complete. To go on, call it again with output_dir={str(root / 'out')!r} and rerun_"
    assert told in errors.decode()
    rows = (root / "out" / "results.csv").read_text().splitlines()
    assert sorted(row.split(",")[1] for row in rows) == ["CANCELLED", "CANCELLED", "NOT RUN", "state"]
    summary = json.loads((root / "out" / "execution_summary.json").read_text())
    assert summary["total_experiments"] == summary["failed_submissions"] == 3
    assert set(summary["failures"].values()) == {"not complete: the run was interrupted"}


def test_children_that_outlive_the_search_hold_its_folder(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", SLEEPING.format(deaf=False))
    with started_search(root) as (parent, children):
        parent.kill()
        parent.wait()
        assert all(is_alive(child) for child in children)
        folder = GridFolder(root / "out", ConfigurationManager(root))
        with pytest.raises(ConfigurationError, match="experiments that outlived theirs"), folder.lock():
            pytest.fail("held twice")
    wait_for(lambda: not any(is_alive(child) for child in children))
    with folder.lock():
        assert executors.settled_folders(list((root / "out").glob("*/"))) == set()


def test_handlers_of_others_are_left_alone(make_plan: MakePlan) -> None:
    def handler(number: int, frame: types.FrameType | None) -> None:
        pass

    former = signal.signal(signal.SIGTERM, handler)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        running = LocalExecutor().run(make_plan(""))
        next(running)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is not interrupt
        running.close()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, former)


def test_dry_run_writes_commands_and_starts_nothing(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan("", folder="with space; $(touch oops) 'é")
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **keywords: pytest.fail("a process was started"))
    executor = DryRunExecutor()
    executor.check(plan)
    assert caplog.messages == []
    assert [outcome.job_id for outcome in executor.run(plan)] == ["DRY_RUN", "DRY_RUN"]
    lines = (plan.output_dir / "commands.txt").read_text(encoding="utf-8").splitlines()
    assert [shlex.split(line) for line in lines] == [task.command for task in plan.tasks()]
    assert not any(job.record_path.exists() for job in plan.jobs)
    executor.check(replace(plan, script_path=plan.script_path.with_name("gone.py")))
    assert "gone.py does not exist" in caplog.text


def slurm_module(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    """Stands for the package with the Slurm executor."""
    package, module = types.ModuleType("slurm"), types.ModuleType("slurm.executor")
    for name, value in attributes.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "slurm", package)
    monkeypatch.setitem(sys.modules, "slurm.executor", module)


def test_dry_run_writes_job_scripts_where_there_are_any(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    slurm_module(monkeypatch, write_job_scripts=plans.append)
    plan = make_plan("")
    assert len(list(DryRunExecutor().run(plan))) == 2
    assert plans == [plan]


def test_executors_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executors.available_executors() == ["dry_run", "local", "slurm"]
    assert isinstance(executors.create_executor("local"), LocalExecutor)
    slurm_module(monkeypatch, SlurmExecutor=lambda: "the executor", create_launcher=lambda *given: given)
    assert executors.create_executor("slurm") == "the executor"
    assert executors.create_launcher("slurm", Path("root"), None) == (Path("root"), None)
    with pytest.raises(ConfigurationError, match=r"received 'lsf'; expected one of \['dry_run', 'local', 'slurm'\]"):
        executors.create_executor("lsf")
    monkeypatch.setattr(executors, "_EXECUTORS", dict(executors._EXECUTORS))
    executors.register_executor("lsf", "trainers.searches.local_executor:LocalExecutor")
    assert isinstance(executors.create_executor("lsf"), LocalExecutor)
    with pytest.raises(ConfigurationError, match=r"received 'somewhere'; expected 'package\.module:attribute'"):
        executors.register_executor("lsf", "somewhere")


def test_missing_executor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(executors._EXECUTORS, "slurm", "no_such_package.executor:SlurmExecutor")
    with pytest.raises(ImportError, match=r"'no_such_package'.*ExecutionMode\.LOCAL.*DRY_RUN") as raised:
        executors.create_executor("slurm")
    assert isinstance(raised.value, MissingExecutor)
    slurm_module(monkeypatch)
    monkeypatch.setitem(executors._EXECUTORS, "slurm", "slurm.executor:SlurmExecutor")
    with pytest.raises(MissingExecutor, match="has no attribute 'SlurmExecutor'.*pass another execution_mode"):
        executors.create_executor("slurm")


def test_missing_dependency_of_an_executor_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cluster_for_tests.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(executors._EXECUTORS, "slurm", "cluster_for_tests:Executor")
    with pytest.raises(MissingExecutor, match=r"'no_such_dependency'.*pip install 'modelbatch-hybrid\[slurm\]'"):
        executors.create_executor("slurm")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"executor": 3}'])
def test_damaged_record_is_an_error(tmp_path: Path, text: str) -> None:
    assert executors.read_record(tmp_path) is None
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"job\.json.*Remove"):
        executors.settled_folders([tmp_path])
