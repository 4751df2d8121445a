"""Check everything that needs a GPU in five minutes, and write what was found as soon as it is found.

    python scripts/gpu_check.py DIR                 all steps, in order; a step that fails does not stop the next
    python scripts/gpu_check.py DIR --only kernels  one step (or several, with commas)
    python scripts/gpu_check.py DIR --dry-run       every step at a tiny size on the CPU, to test this script

DIR gets check.json (every fact, written anew after each step), summary.md (a page) and tests.xml. Each step is a
process of its own with a time-out. It needs torch 2.11 and Python 3.11 or later, and no network: where largebatch is
not installed, put this checkout and the wheels of hydra-core, omegaconf and antlr4-python3-runtime on PYTHONPATH.

Exit status: 0 all steps passed, 1 some failed, 2 a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000  # characters of a step's output that are kept
Facts = dict[str, Any]
TINY = (
    *("dataset=synthetic_small", "dataset.height=8", "dataset.width=8", "dataset.pad=1", "dataset.train_images=32"),
    *("dataset.val_images=16", "model=resnet8", "k=2", "n=4"),
)


@dataclass(frozen=True)
class Place:
    """Settings of a step: ``dry`` is a tiny size on the CPU, ``scratch`` a folder that is removed afterwards."""

    dry: bool
    out: Path
    scratch: Path

    @property
    def device(self) -> str:
        """Return cpu or cuda."""
        return "cpu" if self.dry else "cuda"


def command(*words: str) -> str:
    """Run a command of largebatch in this process, and return what it prints.

    Raises:
        RuntimeError: its exit status is not 0.
    """
    from largebatch.cli.main import run

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = run(list(words))
    if status:
        raise RuntimeError(f"largebatch {' '.join(words)}: exit status {status}\n{printed.getvalue()[-1000:]}")
    return printed.getvalue()


def attempts(works: dict[str, Callable[[], Any]]) -> Facts:
    """Do each piece of work, after a failure too; the facts hold results, and reasons under "failed"."""
    facts: Facts = {}
    failed: Facts = {}
    for name, work in works.items():
        try:
            facts[name] = work()
        except BaseException as error:  # a report that lacks the rest would be worth less, whatever was raised
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"[:500]
    return facts | ({"failed": failed} if failed else {})


def environment(place: Place) -> Facts:
    """Return versions, devices, compiler, shared memory, and the packages that are missing here."""
    import torch

    def said(*words: str) -> str:
        try:
            return subprocess.run(words, capture_output=True, text=True, check=False, timeout=20).stdout.strip()[:1500]
        except OSError as error:
            return str(error)

    needed = "torchvision timm numpy hydra omegaconf PIL scipy safetensors tensorboard tqdm jinja2 matplotlib pytest"
    facts: Facts = {
        "python": sys.version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "nvidia-smi": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,display_active", "--format=csv"),
        "topology": said("nvidia-smi", "topo", "-m"),
        "compiler": said(os.environ.get("CC", "gcc"), "--version").partition("\n")[0],
        "shared_memory_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0,
        "cores": len(os.sched_getaffinity(0)),
        "missing": [name for name in needed.split() if importlib.util.find_spec(name) is None],
    }
    if importlib.util.find_spec("triton"):
        facts["triton"] = importlib.import_module("triton").__version__
    if not place.dry and not facts["gpus"]:
        facts["failed"] = {"gpu": "torch sees no GPU"}
    return facts


def tests(place: Place) -> Facts:
    """Run the tests that are skipped without a GPU; warnings are no errors here."""
    names = ["tests/training/test_cuda_graph.py"]
    if not place.dry:
        names += ["tests/models/test_batchnorm_kernels.py", "tests/quantization/test_cuda.py", "tests/offloading"]
    line = [sys.executable, "-m", "pytest", *names, "-q", "-W", "default", "-p", "no:xdist", "-p", "no:cacheprovider"]
    line += ["-m", "not slow and not acceptance and not slurm", f"--junitxml={place.out / 'tests.xml'}"]
    done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, check=False)
    print(done.stdout[-TAIL:], done.stderr[-1000:])
    last = done.stdout.strip().rpartition("\n")[2]
    return {"result": last} | ({"failed": {"pytest": f"exit status {done.returncode}"}} if done.returncode else {})


def certify(place: Place) -> Facts:
    """Certify the step against its definition: fp64 with fused kernels, bf16, exact fp32."""
    small = [*TINY, "certify.iterations=3"] if place.dry else ["k=8", "n=4", "certify.iterations=3"]
    cases = {
        "fp64_fused": ["precision=fp64", "bn.kernel=" + ("joint" if place.dry else "fused")],
        "bf16": ["precision=" + ("fp32" if place.dry else "bf16")],
        "exact_fp32": ["precision=fp32", "exact=true"],
    }

    def certificate(name: str) -> Facts:
        words = [*small, *cases[name], f"device={place.device}", "certify.processes=[1]", "format=json"]
        facts = json.loads(command("certify", *words, f"run_dir={place.scratch / name}"))
        return {key: facts[key] for key in ("passed", "tolerance", "seconds") if key in facts}

    return attempts({name: lambda name=name: certificate(name) for name in cases})


def _train(place: Place, name: str, *words: str) -> str:
    """Train on the digits; return the SHA-256 of the weights."""
    given = {word.partition("=")[0] for word in words}
    usual = [*(TINY if place.dry else ("k=4", "n=16")), "epochs=2", f"device={place.device}", "loader.workers=0"]
    usual = [word for word in usual if word.partition("=")[0] not in given]
    command("train", *usual, *words, f"run_dir={place.scratch / name}")
    return hashlib.sha256((place.scratch / name / "model.safetensors").read_bytes()).hexdigest()


def _interrupted(place: Place) -> bool:
    """Send SIGTERM to a run once it has written a line, resume it, and compare its weights with an unbroken one's."""
    whole = _train(place, "whole", "deterministic=true", "epochs=4")
    record = place.scratch / "cut" / "metrics.jsonl"

    def end() -> None:
        while not (record.exists() and record.stat().st_size):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with contextlib.suppress(RuntimeError):  # its exit status is that of a run to be called again
        _train(place, "cut", "deterministic=true", "epochs=4")
    status = json.loads((record.parent / "summary.json").read_text())["status"]
    same = _train(place, "cut", "deterministic=true", "epochs=4", "resume=true") == whole
    if not same:
        raise RuntimeError(f"the run was {status}, and resumed it ends with other weights than without a stop")
    return status == "interrupted"


def digits(place: Place) -> Facts:
    """Train the digits: twice with the same bits, cut off and resumed, and with CUDA graphs on and off."""

    def same() -> str:
        first, second = (_train(place, name, "deterministic=true") for name in ("first", "second"))
        if first != second:
            raise RuntimeError("deterministic=true gave two networks")
        return first

    def graphs(on: str) -> Facts:
        words = [f"cuda_graphs={on}"] if not place.dry else []
        _train(place, f"graphs_{on}", *words, "epochs=4")
        lines = [json.loads(line) for line in (place.scratch / f"graphs_{on}" / "metrics.jsonl").open()]
        last = [line for line in lines if line["kind"] == "epoch"][-1]
        return {key: last[key] for key in ("val_error", "train_loss", "images_per_second")}

    works: dict[str, Callable[[], Any]] = {"same_bits": same, "resumed": lambda: _interrupted(place)}
    return attempts(works | {f"graphs_{on}": lambda on=on: graphs(on) for on in ("false", "true")})


def exchange(place: Place) -> Facts:
    """Use DDP, its hook, no_sync and the tree sum in a group of one process, and leave it."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from largebatch.config.groups import ExchangeConfig
    from largebatch.runtime.world import World, leave
    from largebatch.training.exchange import Averaging

    device = torch.device(place.device)
    store = f"file://{place.scratch / 'store'}"
    dist.init_process_group("gloo" if place.dry else "nccl", init_method=store, rank=0, world_size=1)
    two = dataclasses.replace(World(0, 1, device), size=2)  # as if there were another: DDP then wraps the network

    def passes(compress: str) -> float:
        torch.manual_seed(0)
        model = nn.Linear(64, 8).to(device)
        config = ExchangeConfig(bucket_mb=25.0, gradient_as_bucket_view=False, static_graph=False, compress=compress)
        averaging = Averaging(model, two, config)
        images = torch.ones(4, 64, device=device)
        for number in range(3):
            with averaging.passing(last=number == 2):
                averaging.net(images).sum().backward()
        averaging.finish()
        expected = torch.full_like(model.weight, 12.0)  # 3 passes of 4 samples of ones
        torch.testing.assert_close(model.weight.grad, expected)
        return float(model.weight.grad.sum())

    works: dict[str, Callable[[], Any]] = {
        "no_sync": lambda: passes("none"),
        "hook_bf16": lambda: passes("bf16"),
        "tree_sum": lambda: World(0, 1, device).tree_sum(torch.ones(8, device=device)).sum().item(),
        "broadcast": lambda: two.broadcast(torch.ones(8, device=device)),
        "barrier": two.barrier,
        "leave": leave,
    }
    return attempts(works) | {"waits": attempts({"evaluation": lambda: _waits(place)})}


def _waits(place: Place) -> Facts:
    """Count the times that evaluation makes the CPU wait for the GPU."""
    import torch

    from largebatch.runtime.world import World
    from largebatch.training.cuda_graph import copied_aside
    from largebatch.training.validation import batches_of, evaluate

    ours = _ours(place, [])
    cuts = batches_of(ours.source.val_images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not place.dry:
            torch.cuda.set_sync_debug_mode("warn")
        batches = copied_aside(ours.source.validation(cuts), ours.learner.world.device)
        evaluate(ours.learner.model, batches, range(len(cuts)), cuts, World(0, 1, ours.learner.world.device))
        if not place.dry:
            torch.cuda.set_sync_debug_mode("default")
    return {"batches": len(cuts), "waits": sum("synchroniz" in str(one.message) for one in caught)}


def _ours(place: Place, words: list[str]) -> Any:
    """Return the product's step on made-up images."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from largebatch.bench.step import make_ours
    from largebatch.cli.compose import configuration_directory
    from largebatch.config.run import Config
    from largebatch.runtime.placement import place as decide
    from largebatch.runtime.world import hardware

    words = ["dataset=synthetic_small", "model=resnet8", "k=2", "n=8", f"device={place.device}", *words]
    given = {word.partition("=")[0]: word for word in words}  # the last one of a key counts
    with initialize_config_dir(version_base="1.3", config_dir=str(configuration_directory())):
        values = OmegaConf.to_container(compose("train", overrides=list(given.values())), resolve=True)
    values.pop("experiment", None)
    config = Config.from_mapping(values)
    return make_ours(config, decide(config, hardware(config.device)))


SHAPES = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))  # ResNet-50's: channels, height


def kernels(place: Place) -> Facts:
    """Return GB/s of the BatchNorm kernels, forward and backward, and of a copy; and the longest of a step."""
    import torch

    from largebatch.models.batchnorm_kernels import normalise

    if place.dry:  # Triton's interpreter takes seconds for what a GPU does in microseconds
        shapes, groups, n, times = ((8, 4), (16, 2)), 2, 2, 1
    else:
        shapes, groups, n, times = SHAPES, 8, 32, 10
    dtype = torch.float32 if place.dry else torch.bfloat16

    def clocked(work: Callable[[], Any]) -> float:
        work()
        if place.dry:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def speeds(channels: int, height: int) -> Facts:
        x = torch.randn(groups * n, channels, height, height, device=place.device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, bias = (torch.ones(channels, device=place.device, requires_grad=True) for _ in range(2))
        added, other = torch.zeros_like(x), torch.empty_like(x)
        facts: Facts = {}
        size = x.numel() * x.element_size()
        facts["copy"] = 2 * size / clocked(lambda: other.copy_(x.detach())) / 1e9
        # Tensors read and written by our kernels: forward reads x twice (and the shortcut), writes y.
        for name, residual, forward, backward in (("relu", None, 3, 5), ("residual", added, 4, 8)):
            facts[name] = (
                forward * size / clocked(lambda r=residual: normalise(x, weight, bias, groups, 1e-5, r, True)) / 1e9
            )
            y = normalise(x, weight, bias, groups, 1e-5, residual, True)[0]
            seconds = clocked(lambda y=y: torch.autograd.grad(y, [x, weight, bias], other, retain_graph=True))
            facts[f"{name}_backward"] = backward * size / seconds / 1e9
        return facts

    works: dict[str, Callable[[], Any]] = {f"{c}x{h}x{h}": lambda c=c, h=h: speeds(c, h) for c, h in shapes}
    return attempts(works | {"profile": lambda: _profile(place)})


def _profile(place: Place) -> list[str]:
    """Return the 25 longest operations of three steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if place.dry else ProfilerActivity.CUDA
    ours = _ours(place, [] if place.dry else ["model=resnet50", "dataset=synthetic", "k=8", "n=32"])
    ours.step()
    with profile(activities=[activity]) as found:
        for _ in range(1 if place.dry else 3):
            ours.step()
        if not place.dry:
            torch.cuda.synchronize()
    key = "self_cpu_time_total" if place.dry else "self_device_time_total"
    longest = sorted(found.key_averages(), key=lambda one: -getattr(one, key))[:25]
    return [f"{getattr(one, key) / 1e3:10.2f} ms {one.count:6d} × {one.key[:90]}" for one in longest]


def _bench(place: Place, *words: str) -> Facts:
    return dict(json.loads(command("bench", *words, f"device={place.device}", "format=json")))


def folder(place: Place) -> Facts:
    """Read photographs from a folder through pinned memory."""
    few = (
        ["bench.photographs=32", "bench.repeats=1", "n=8"]
        if place.dry
        else ["bench.photographs=256", "bench.repeats=2"]
    )
    return attempts({"loader": lambda: _bench(place, "loader", *few, "loader.workers=" + ("0" if place.dry else "8"))})


def memory(place: Place) -> Facts:
    """Measure offloading and integers."""
    if place.dry:
        few = [
            "bench.repeats=1",
            "bench.batches=[2]",
            "bench.photographs=32",
            "model=resnet8",
            "dataset=synthetic_small",
        ]
    else:
        few = ["bench.repeats=2", "bench.batches=[32]"]
    return attempts({what: lambda what=what: _bench(place, what, *few) for what in ("offload", "quantize")})


def resnet50(place: Place) -> Facts:
    """Time the step of ResNet-50 at k = 8, n = 32 in every way, and plain loops."""
    sides = "[plain,ours,separate]" if place.dry else "[plain,plain_compiled,ours,separate,graphs]"
    few = ["bench.sides=" + sides, "bench.repeats=" + ("1" if place.dry else "3")]
    if place.dry:
        few += ["model=resnet8", "n=4", "bench.k=[2]", "dataset=synthetic_small"]
    else:
        few += ["model=resnet50", "n=32", "bench.k=[8]", "dataset=synthetic", "bench.iterations=4"]
    return attempts({"step": lambda: _bench(place, "step", *few)})


def rest(place: Place) -> Facts:
    """Time small networks as CUDA graphs, and our own compiled step."""
    if place.dry:
        few = ["model=resnet8", "n=4", "bench.k=[2]", "bench.repeats=1", "bench.sides=[ours,micro]"]
        return attempts({"small": lambda: _bench(place, "step", "dataset=synthetic_small", *few)})
    usual = ["n=32", "bench.k=[8]", "bench.repeats=3"]
    small = ["model=resnet20", "bench.iterations=20", "bench.sides=[plain,dataloader,ours,graphs,micro,micro_graphs]"]
    large = ["model=resnet50", "dataset=synthetic", "bench.iterations=4", "bench.sides=[plain_compiled,compiled]"]
    return attempts(
        {
            "small": lambda: _bench(place, "step", *usual, *small),
            "compiled": lambda: _bench(place, "step", *usual, *large),
        }
    )


# In this order, with seconds: what is cheap and decides about the rest comes first.
STEPS: dict[str, tuple[Callable[[Place], Facts], int]] = {
    "environment": (environment, 20),
    "tests": (tests, 60),
    "certify": (certify, 45),
    "digits": (digits, 45),
    "exchange": (exchange, 20),
    "kernels": (kernels, 40),
    "folder": (folder, 25),
    "memory": (memory, 40),
    "resnet50": (resnet50, 75),
    "rest": (rest, 60),
}
WHOLE = 295  # seconds of all together


def perform(name: str, dry: bool, out: Path, seconds: float) -> Facts:
    """Run a step in a process of its own, for so many seconds, and return what it found and how it ended."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        answer, printed = Path(scratch, "answer.json"), Path(scratch, "printed")
        line = [sys.executable, "-W", "default", __file__, str(out), "--inside", name, "--answer", str(answer)]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1" if dry else "8"}
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {}
        with printed.open("wb") as log:
            # In a session of its own: loaders and ranks end with the step.
            child = subprocess.Popen(
                line + ["--dry-run"] * dry, stdout=log, stderr=log, cwd=scratch, env=variables, start_new_session=True
            )
            late = False
            try:
                child.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        facts = json.loads(answer.read_text()) if answer.exists() else {}
        text = printed.read_bytes().decode(errors="replace")[-TAIL:]
    passed = not late and child.returncode == 0 and "failed" not in json.dumps(facts)
    why = f"time-out after {seconds:.0f} s" if late else "" if passed else f"exit status {child.returncode}"
    ended = {"passed": passed, "why": why, "seconds": round(time.monotonic() - begun, 1), "found": facts}
    return ended if passed else ended | {"printed": text}


def page(results: Facts) -> str:
    """Return the results for people."""
    lines = [
        f"# GPU check{' (dry run on the CPU)' * results['dry_run']}",
        "",
        "| step | result | seconds |",
        "|---|---|---|",
    ]
    for name, one in results["steps"].items():
        failed = "; ".join(f"{key}: {why}" for key, why in one["found"].get("failed", {}).items())
        words = "passed" if one["passed"] else " ".join(f"FAILED: {one['why']} {failed}".split())[:200]
        lines.append(f"| {name} | {words.replace('|', '/')} | {one['seconds']:g} |")
    steps = {name: one["found"] for name, one in results["steps"].items()}
    lines += [
        "",
        *(f"- {key}: {value}" for key, value in steps.get("environment", {}).items() if key in ("torch", "gpus")),
    ]
    for shape, speeds in steps.get("kernels", {}).items():
        if shape not in ("failed", "profile"):
            lines.append(f"- GB/s at {shape}: " + ", ".join(f"{name} {speed:,.4g}" for name, speed in speeds.items()))
    for step in ("resnet50", "rest"):
        for part, facts in steps.get(step, {}).items():
            speeds = facts.get("variants", {}).get("images_per_second", {})
            lines += [f"- {step}, {part}: {name} {speed:,.0f} images/s" for name, speed in speeds.items()]
    return "\n".join(lines) + "\n"


def write(out: Path, results: Facts) -> None:
    """Replace check.json and summary.md."""
    for name, text in (("check.json", json.dumps(results, indent=1) + "\n"), ("summary.md", page(results))):
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def inside(name: str, place: Place, answer: Path) -> None:
    """Do a step in this process, and leave what it found in a file."""
    facts = STEPS[name][0](place)
    answer.write_text(json.dumps(facts, default=str), encoding="utf-8")


def chosen(only: str | None) -> Iterator[str]:
    """Yield the names of the steps, in order."""
    wanted = only.split(",") if only else list(STEPS)
    unknown = [name for name in wanted if name not in STEPS]
    if unknown:
        print(f"--only {','.join(unknown)} is no step. These are: {', '.join(STEPS)}.", file=sys.stderr)
        sys.exit(2)
    yield from (name for name in STEPS if name in wanted)


def main() -> int:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--only", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    out = asked.out.resolve()
    if asked.inside:
        inside(asked.inside, Place(asked.dry_run, out, Path.cwd()), asked.answer)
        return 0
    names = list(chosen(asked.only))
    out.mkdir(parents=True, exist_ok=True)
    results: Facts = {"dry_run": asked.dry_run, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "steps": {}}
    begun = time.monotonic()
    for name in names:
        left = max(5.0, WHOLE - (time.monotonic() - begun))
        # A dry run is not about time: other work may fill the machine.
        seconds = 600.0 if asked.dry_run else min(STEPS[name][1], left)
        results["steps"][name] = one = perform(name, asked.dry_run, out, seconds)
        write(out, results)
        print(f"{name:12} {'passed' if one['passed'] else 'FAILED ' + one['why']}  {one['seconds']:.1f} s", flush=True)
    print((out / "summary.md").read_text())
    return 0 if all(one["passed"] for one in results["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
