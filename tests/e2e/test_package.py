"""The wheel, built through the source distribution and installed elsewhere, works from any directory."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the bin/ of a new environment that holds the wheel, with the dependencies of this one."""
    place = tmp_path_factory.mktemp("package")
    run("uv", "build", "--quiet", "--out-dir", place / "dist", ROOT, cwd=place)  # the wheel is made from the sdist
    (wheel,) = (place / "dist").glob("*.whl")
    run("uv", "venv", "--quiet", "--python", sys.executable, place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", python, "--no-deps", wheel, cwd=place)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    # A path file puts the dependencies behind the wheel, and reads no other path files: ours is not the editable one.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_it_is_the_wheel_that_runs(installed, tmp_path):
    where = run(installed / "python", "-c", "import largebatch; print(largebatch.__file__)", cwd=tmp_path)
    assert where.startswith(str(installed.parent))


def test_version(installed, tmp_path):
    assert run(installed / "largebatch", "--version", cwd=tmp_path) == "largebatch 0.2.0\n"
    assert run(installed / "python", "-m", "largebatch", "--version", cwd=tmp_path) == "largebatch 0.2.0\n"


def test_explain_finds_its_configuration(installed, tmp_path):
    assert "kn = 256 × 32 = 8192" in run(installed / "largebatch", "explain", "experiment=imagenet_1h", cwd=tmp_path)


def test_report_finds_its_templates_plot_the_published_points_and_predict_its_profile(installed, tmp_path):
    records = ROOT / "results" / "digits-curves"
    assert run(installed / "largebatch", "report", f"runs={records}", cwd=tmp_path) == "report.html\n"
    assert run(installed / "largebatch", "plot", "scaling", "paper=true", cwd=tmp_path) == "scaling.svg\n"
    assert "Tesla P100" in run(installed / "largebatch", "predict", cwd=tmp_path)


def test_the_decoder_in_c_is_compiled_from_the_wheel(installed, tmp_path):
    program = "from largebatch.data import native; native.load(); print(native.HERE)"
    where = run(installed / "python", "-c", program, cwd=tmp_path, LARGEBATCH_CACHE=str(tmp_path))
    assert where.startswith(str(installed.parent))
    assert len([*tmp_path.rglob("jpeg-*.so")]) == 1


def test_a_submission_finds_its_batch_script(installed, tmp_path):
    script = run(installed / "largebatch", "train", "launcher=slurm", "launcher.dry_run=true", cwd=tmp_path)
    assert f"rank {installed / 'python'} -m largebatch sweep run" in script


def test_train_and_sweep_record_where_they_were_started(installed, tmp_path):
    run(installed / "largebatch", "train", "-m", "k=1,2", "iterations=2", "threads=1", cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/sweeps/*/k[12]-*/summary.json"))) == 2


def test_the_lock_holds_for_every_python_and_platform_promised():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    run("uv", "lock", "--check", "--quiet", cwd=ROOT)
    torch = next(package for package in lock["package"] if package["name"] == "torch")
    wheels = [wheel["url"].rpartition("/")[2] for wheel in torch["wheels"]]
    for python in ("cp311", "cp312", "cp313", "cp314"):
        for platform in ("manylinux_2_28_x86_64", "macosx_14_0_arm64"):
            assert f"torch-{torch['version']}-{python}-{python}-{platform}.whl" in wheels
