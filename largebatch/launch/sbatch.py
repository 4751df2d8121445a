"""Arrays of a SLURM cluster: batch scripts, their submission, and what has become of their elements.

A sweep's directory holds, besides what the sweep itself keeps there:

``slurm/<number>.sh``
    A batch script an array, as it was submitted.
``jobs.jsonl``
    A line an array: ``job`` (the array's number at SLURM), ``script``, ``tasks`` (their numbers in the sweep),
    ``offset`` (a task is element ``task - offset`` of the array) and ``submitted``, when.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from largebatch.base.errors import Fault, UserError
from largebatch.base.signals import ENDED
from largebatch.config.launchers import SlurmConfig

JOBS = "jobs.jsonl"
SCRIPTS = "slurm"
TEMPLATE = Path(__file__).with_name("sbatch.sh.j2")

NO_VAL = str(2**32 - 2)  # SLURM's word for no number
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED")
ACTIVE = ("RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING")


@dataclass(frozen=True)
class Element:
    """A task at SLURM: element ``job`` (12_3) of an array.

    ``state`` is SLURM's word (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL …), ``reason`` why
    it waits or has ended, "" where there is none to tell; ``restarts`` how often it queued again; ``nodes`` where it
    runs or ran.
    """

    job: str
    state: str
    reason: str
    restarts: int
    nodes: str

    @property
    def queued(self) -> bool:
        """Whether it waits for its turn."""
        return self.state in WAITING

    @property
    def running(self) -> bool:
        """Whether it occupies its nodes."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class Array:
    """Tasks that ask for the same: ``processes`` ranks and ``gpus`` GPUs in all, shared out over ``nodes``."""

    settings: SlurmConfig
    nodes: int
    processes: int
    gpus: int
    tasks: tuple[int, ...]
    offset: int = 0

    @property
    def elements(self) -> str:
        """Their numbers in the array, as sbatch takes them: 0,2-5."""
        return ranges([task - self.offset for task in self.tasks])

    def options(self, directory: Path) -> list[str]:
        """Return sbatch's options, the user's own last, so that they win."""
        asked = self.settings
        throttle = f"%{asked.max_concurrent}" if asked.max_concurrent else ""
        named = {
            "job-name": "largebatch",
            "array": self.elements + throttle,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "time": asked.time,
            "nodes": str(self.nodes),
            "ntasks-per-node": str(self.processes // self.nodes),
            "gres": f"gpu:{self.gpus // self.nodes}" if self.gpus else None,
            "cpus-per-task": asked.cpus_per_gpu and str(asked.cpus_per_gpu),
            "mem": asked.mem,
            "signal": f"B:USR1@{asked.signal_seconds}",
            "chdir": str(Path.cwd()),
            # What is said before and after the script; the script's own output goes to the task's log.
            "output": str(directory / SCRIPTS).replace("%", "%%") + "/%A_%a.log",
        }
        given = [f"--{name}={value}" for name, value in named.items() if value]
        return [*given, "--requeue", "--open-mode=append", *asked.options]

    def script(self, directory: Path) -> str:
        """Return the batch script, for the sweep in ``directory`` (absolute)."""
        import jinja2

        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        environment.filters |= {"quote": shlex.quote, "directive": directive}
        return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            tasks=ranges(self.tasks),
            offset=self.offset,
            options=self.options(directory),
            sweep=str(directory),
            setup=self.settings.setup,
            cpus=self.settings.cpus_per_gpu,
            python=sys.executable,
            ended=ENDED,
            max_restarts=self.settings.max_restarts,
        )


def directive(option: str) -> str:
    """Return an option as a ``#SBATCH`` line takes it: in sbatch's own quotes, which are the shell's.

    Raises:
        UserError: it holds a line break, after which the rest would be shell.
    """
    if "\n" in option or "\r" in option:
        raise UserError(
            f"{option!r} holds a line break, which a batch script's options cannot: use a directory, or a value of "
            "launcher, without one."
        )
    return shlex.quote(option)


def ranges(numbers: Iterable[int]) -> str:
    """Return rising numbers as SLURM writes them: 0,2-5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans)


def numbers(text: str) -> list[int]:
    """Return the numbers that SLURM has written as ranges: 0,2-5%2."""
    found: list[int] = []
    for span in text.partition("%")[0].split(","):
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def split(array: Array, limit: int) -> list[Array]:
    """Split an array where its elements' numbers would reach the cluster's MaxArraySize, ``limit``."""
    blocks: dict[int, list[int]] = {}
    for task in sorted(array.tasks):
        blocks.setdefault(task - task % limit, []).append(task)
    return [
        Array(array.settings, array.nodes, array.processes, array.gpus, tuple(tasks), offset)
        for offset, tasks in blocks.items()
    ]


def submit(directory: Path, arrays: Sequence[Array]) -> dict[str, Array]:
    """Submit arrays of tasks of the sweep in ``directory``, and return them, or their parts, by number at SLURM.

    Raises:
        UserError: this is no SLURM cluster, or sbatch refuses one, in its own words. Those before it stay submitted.
    """
    directory = directory.absolute()
    (directory / SCRIPTS).mkdir(parents=True, exist_ok=True)
    limit = _largest_array()
    jobs: dict[str, Array] = {}
    for array in [part for whole in arrays for part in split(whole, limit)]:
        script = directory / SCRIPTS / f"{len(list((directory / SCRIPTS).glob('[0-9]*.sh')))}.sh"
        script.write_text(array.script(directory), encoding="utf-8")
        try:
            job = _call("sbatch", "--parsable", str(script)).partition(";")[0].strip()
        except Fault as error:
            before = f" Submitted before it: {', '.join(jobs)}." if jobs else " Nothing was submitted."
            raise UserError(f"{error} The batch script is {script}.{before}") from None
        jobs[job] = array
        line = {"job": job, "script": f"{SCRIPTS}/{script.name}", "tasks": array.tasks, "offset": array.offset}
        line |= {"submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with (directory / JOBS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return jobs


def states(directory: Path) -> dict[int, Element]:
    """Return what SLURM knows of the sweep's tasks; one that it has forgotten, or never knew, is missing.

    Without accounting SLURM forgets an element minutes after its end; with it, sacct is asked for those.

    Raises:
        UserError: this is no SLURM cluster.
        Fault: SLURM does not answer.
    """
    elements: dict[str, Element] = {}
    places = _places(directory)
    jobs = list(dict.fromkeys(element.partition("_")[0] for element in places.values()))
    for job in jobs:
        try:
            elements |= parse_scontrol(_call("scontrol", "--oneliner", "show", "job", job))
        except Fault as error:
            if "Invalid job id" not in str(error):
                raise
    if not elements.keys() >= set(places.values()):
        elements = parse_sacct(_accounted(jobs)) | elements
    return {task: elements[element] for task, element in places.items() if element in elements}


def cancel(directory: Path) -> list[str]:
    """Cancel what waits or runs of a sweep, and return those elements; those that run write a checkpoint first.

    Raises:
        UserError: this is no SLURM cluster.
        Fault: SLURM does not answer.
    """
    alive = [element.job for element in states(directory).values() if element.queued or element.running]
    if alive:
        _call("scancel", *alive)
    return alive


def parse_scontrol(text: str) -> dict[str, Element]:
    """Return elements by job from ``scontrol --oneliner show job``; those that wait may share a line."""
    elements = {}
    for line in text.splitlines():
        fields = dict(re.findall(r"(?:^| )(ArrayJobId|ArrayTaskId|JobState|Reason|Restarts|NodeList)=(\S*)", line))
        # None where scontrol has nothing to show; no number where all of an array was cancelled before its first start.
        if fields.get("ArrayTaskId", NO_VAL) not in (NO_VAL, "N/A"):
            word = fields["Reason"]
            reason = "" if word == "None" else word
            nodes = "" if fields["NodeList"] == "(null)" else fields["NodeList"]
            for number in numbers(fields["ArrayTaskId"]):
                job = f"{fields['ArrayJobId']}_{number}"
                elements[job] = Element(job, fields["JobState"], reason, int(fields["Restarts"]), nodes)
    return elements


def parse_sacct(text: str) -> dict[str, Element]:
    """Return elements by job from :func:`_accounted`: a line for every start of one, the last one last."""
    elements: dict[str, Element] = {}
    for line in text.splitlines():
        name, state, nodes = line.split("|")
        job, _, inner = name.partition("_")
        if not inner:  # an array before its first start
            continue
        for number in numbers(inner.strip("[]")):
            key = f"{job}_{number}"
            restarts = elements[key].restarts + 1 if key in elements else 0
            where = "" if nodes == "None assigned" else nodes
            elements[key] = Element(key, state.split()[0], "", restarts, where)  # "CANCELLED by 1000"
    return elements


def _accounted(jobs: Sequence[str]) -> str:
    """Ask sacct for arrays: "" where the cluster keeps no accounts."""
    words = ("--noheader", "--parsable2", "--allocations", "--duplicates", "--format=JobID,State,NodeList")
    try:
        return _call("sacct", *words, f"--jobs={','.join(jobs)}")
    except Fault:
        return ""


def _places(directory: Path) -> dict[int, str]:
    """Return for every task that was submitted the element that it was last."""
    try:
        text = (directory / JOBS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    lines = map(json.loads, text.splitlines())
    return {task: f"{line['job']}_{task - line['offset']}" for line in lines for task in line["tasks"]}


def _largest_array() -> int:
    """Return MaxArraySize: an element's number is below it."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    if not found:
        raise Fault("scontrol show config does not print MaxArraySize.")
    return int(found[1])


def _call(*words: str) -> str:
    """Run one of SLURM's commands, and return what it prints.

    Raises:
        UserError: there is no such command here.
        Fault: it fails; the message is its own.
    """
    # Within a job SLURM's variables describe that job, and would be taken as requests for the next one.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    try:
        # BITSTR_LEN: lists of elements in full.
        done = subprocess.run(words, env={**kept, "SLURM_BITSTR_LEN": "0"}, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {words[0]} on this machine: launcher=slurm takes a cluster's login node. launcher=local runs "
            "here."
        ) from None
    if done.returncode:
        said = " ".join(re.sub(rf"^{words[0]}: (error: )?", "", line) for line in done.stderr.splitlines())
        raise Fault(f"{words[0]} failed: {said.strip().rstrip('.')}.")
    return done.stdout
