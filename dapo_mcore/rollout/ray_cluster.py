"""The Ray cluster that engine actors live in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray._private import ray_constants

from dapo_mcore.config import RayConfig
from dapo_mcore.platform import platform
from dapo_mcore.rollout.ray_engine import EngineActor

LOOPBACK = "127.0.0.1"
ENVIRONMENT = "DAPO_ROLLOUT_ENVIRONMENT"  # JSON, from the launcher: what engines need otherwise than the trainer
TOO_SLOW = "timed out during startup"
STARTS = 3
T = TypeVar("T")


def connect(options: RayConfig) -> None:
    """Join the cluster at `options.address`, or start one for this process alone, at the loopback address.

    Raises:
        ValueError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if options.address:
        try:
            ray.init(address=options.address, log_to_driver=False)
        except ConnectionError as error:
            raise ValueError(
                f"rollout.ray.address={options.address}: no Ray cluster answers there ({error}); start one with "
                "`ray start --head`, or leave the option empty for a cluster of this run's own"
            ) from None
        return
    patiently(lambda: _start_at_loopback(options))


def _start_at_loopback(options: RayConfig) -> None:
    # Else Ray replaces a loopback address by one of the machine's, and its daemons listen on all of them.
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        address="local",
        num_cpus=math.ceil(options.num_engines * options.cpus_per_engine),
        object_store_memory=options.object_store_mb << 20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address=LOOPBACK,
    )


def patiently(start: Callable[[], T], times: int = STARTS) -> T:
    """What `start` returns. Ray gives its daemons 30 s, which beside ranks that load is sometimes too little: again."""
    try:
        return start()
    except Exception as error:  # Ray has no class for it
        if times == 1 or TOO_SLOW not in str(error):
            raise
    return patiently(start, times - 1)


def disconnect() -> None:
    """Leave the cluster; the engines of this run end with that, and so does a cluster of its own."""
    ray.shutdown()


def start_actor(options: RayConfig, devices: int) -> Any:
    """An actor for an engine over so many devices, which starts as soon as a machine of the cluster has them free."""
    actor: Any = ray.remote(EngineActor)
    resources = platform().actor_resources(devices)
    variables: dict[str, str] = json.loads(os.environ.get(ENVIRONMENT, "{}"))
    if variables:  # Ray starts a process for each set of them, so only where there is a difference
        resources["runtime_env"] = {"env_vars": variables}
    return actor.options(num_cpus=options.cpus_per_engine, max_restarts=0, **resources).remote()
