"""The one entry point, started on every rank: `python -m dapo_mcore.train experiment=quickstart key=value ...`.

Composes the options, refuses what cannot work before anything heavy is imported, builds the parts, runs the loop.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dapo_mcore.config import RunConfig
from dapo_mcore.config_check import check
from dapo_mcore.launched import is_scheduler, is_spokesman, place
from dapo_mcore.observe.quiet import quiet_libraries

if TYPE_CHECKING:
    from dapo_mcore.end_of_step import EndOfStep

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
EXPLAIN = "--explain-env"
FAILED = 1
CAUSE_SPEAKS_S = 10.0
# What gloo, NCCL, HCCL and the store say when another rank is gone.
LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|remote process (has )?exited|connect\w* .*timed? ?out|"
    r"remote ?error|failed to recv|timed out waiting",
    re.IGNORECASE,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the run ended by its own rules; otherwise one error is on stderr and the result is not 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if is_scheduler(os.environ):
        return 0
    if EXPLAIN in arguments:
        return explain_environment([argument for argument in arguments if argument != EXPLAIN])
    try:
        rank, world_size = place(os.environ)
        config = load_config(arguments)
        check(config, world_size)
    except ValueError as error:  # the same on every rank: they read the same options
        if is_spokesman(os.environ):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            let_cause_speak()
        return FAILED
    return run(config, rank, world_size)


def explain_environment(arguments: Sequence[str]) -> int:
    """The launchers' table of environment variables; `arguments` may name another site: --platform npu --nodes 2."""
    return subprocess.run([sys.executable, "-m", "launch.environment", "--explain", *arguments], cwd=ROOT).returncode


def load_config(overrides: Sequence[str]) -> RunConfig:
    """Typed options from the dataclasses, configs/ and `overrides` (`name=value`, in hydra's grammar).

    Raises:
        ValueError: an unknown option, a value of the wrong type or a missing one, by name.
    """
    for override in overrides:
        _check_name(override)
    ConfigStore.instance().store(name="schema", node=RunConfig)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("run", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from None
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(
            f"{missing[0]}: has no default and was not given; add {missing[0]}=VALUE, or an experiment=NAME"
        )
    return cast(RunConfig, OmegaConf.to_object(config))


def _check_name(override: str) -> None:
    name, given, _ = override.partition("=")
    known = [*option_names(RunConfig), "experiment"]
    if given and (name in known or name.rpartition(".")[0].endswith(".task_options")):
        return
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "dapo_mcore/config.py lists the options"
    raise ValueError(f"{override}: {'no such option' if given else 'expected name=value'}; {hint}")


def _one_line(error: Exception) -> str:
    """Hydra's message with its cause, without the parts that only its developers can use."""
    lines = [line.strip() for line in (*str(error).splitlines(), *str(error.__cause__ or "").splitlines())]
    noise = ("full_key:", "reference_type=", "object_type=", "Config search path:", "provider=", "See https")
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))


def option_names(options: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options below a dataclass."""
    for option in fields(options):
        factory: Any = option.default_factory
        if is_dataclass(factory):
            yield from option_names(cast(type, factory), f"{prefix}{option.name}.")
        else:
            yield prefix + option.name


def run(config: RunConfig, rank: int, world_size: int) -> int:
    """Build and train; an error is told once, by the first rank where it happened, with the traceback in a file."""
    quiet_libraries()
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # platform/ loads what torch would, and says what fails
    from dapo_mcore.platform import UnusableDeviceError, adapt_megatron

    try:
        adapt_megatron()  # before transformers is imported
    except UnusableDeviceError as error:
        if rank:  # first rank 0, then one of each other machine, then all: most faults are everybody's
            let_cause_speak(turns=1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return FAILED
    from dapo_mcore.assemble import assembled
    from dapo_mcore.checkpoint.store import CheckpointNotWritten
    from dapo_mcore.rollout.leader import LeaderError

    try:
        if rank == 0:
            tell_memory(config, world_size)
        with assembled(config) as (train, end):
            end.before_training()
            if not config.trainer.val_only:
                train_to_end(train, end)
    except LeaderError:
        let_cause_speak()
        return FAILED
    except Exception as error:  # noqa: BLE001 - the end of the process: told in one line, the rest in a file
        details = _write_traceback(config, rank)
        if rank or LOST_PEER.search(str(error)):  # rank 0 may have the same to tell; or another rank's end is the cause
            let_cause_speak()
        kind = "" if isinstance(error, (ValueError, CheckpointNotWritten)) else f"{type(error).__name__}: "
        print(f"error: {kind}{error}\n  (rank {rank}; traceback in {details})", file=sys.stderr, flush=True)
        return FAILED
    return 0


def train_to_end(train: Callable[[], None], end: EndOfStep) -> None:
    """Whichever end it is: the last step, a rule of the run, or a signal, after which the model is not exported."""
    from dapo_mcore.interruption import Interrupted
    from dapo_mcore.rollout.leader import StopRun

    try:
        train()
    except StopRun as reason:
        end.stopped(str(reason))
        if isinstance(reason, Interrupted):
            return
    end.end_of_run()


def tell_memory(config: RunConfig, world_size: int) -> None:
    """What the run is going to take, before it takes it."""
    from dapo_mcore.actor.build import read_hf_config
    from dapo_mcore.memory import footprint, table

    found = footprint(config, read_hf_config(config.model.path), world_size)
    print("\n".join(table(found, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))), flush=True)


def let_cause_speak(turns: int = 1) -> None:
    """Launchers end all ranks as soon as one fails: give the one that knows the cause the time to fail first."""
    time.sleep(turns * CAUSE_SPEAKS_S)


def _write_traceback(config: RunConfig, rank: int) -> Path:
    """In the output folder, or where that cannot be written, in the system's folder for temporary files."""
    for folder in (Path(config.trainer.output_dir), Path(tempfile.gettempdir())):
        file = folder / f"error_rank{rank}.txt"
        try:
            file.write_text(traceback.format_exc())
        except OSError:
            continue
        return file
    return Path(os.devnull)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code) if code else sys.exit(0)  # a failed rank does not wait in destructors for the others
elif __name__ == "__mp_main__":  # a checkpoint writer started by Megatron: it must find the adapted modules
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to every process; the checkpoint is to be complete
    import dapo_mcore.actor  # noqa: F401
