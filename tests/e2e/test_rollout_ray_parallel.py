"""A Ray engine over several worker processes: it samples what one process does, and lives and ends as one."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest

from dapo_mcore.config import RayConfig
from dapo_mcore.rollout.engine import Sampling, generate
from dapo_mcore.rollout.ray_engine import EngineArguments
from dapo_mcore.rollout.ray_pool import RayPool
from dapo_mcore.types import Response
from tests.e2e.tiny_policies import (
    LENGTHS,
    Letters,
    model_config,
    requests,
    rollout_config,
    save_policy,
    started,
    weights_in,
)

WANTED = requests(4, 2, length=20)
SAMPLING = Sampling(1.0, 12)
NATS = 2e-5  # two partial sums are added in another order than one whole
OPTIONS = RayConfig(object_store_mb=80, max_replacements=0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder, "qwen3_moe", 1)
    return folder


@pytest.fixture(scope="module")
def expected(policy: Path) -> list[Response]:
    with started(policy) as engine:
        return generate(engine, WANTED, SAMPLING)


@pytest.fixture(scope="module")
def pool(expected: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """Of one engine, over two processes, each with half of the experts of another policy."""
    folder = tmp_path_factory.mktemp("another")
    save_policy(folder, "qwen3_moe", 2)
    options = rollout_config(tensor_model_parallel_size=2, enable_expert_parallel=True)
    pool = RayPool(
        OPTIONS, EngineArguments(model_config(folder), options, Letters(), *LENGTHS.values(), record_routes=False)
    )
    yield pool
    pool.close()


def family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def of_engine() -> list[psutil.Process]:
    actors = [process for process in family() if process.name().startswith("ray::")]
    return [process for actor in actors for process in (actor, *actor.children(recursive=True))]


def workers() -> list[psutil.Process]:
    """In the order of their ranks, in which they were started. Not told by the title that vLLM gives them: not every
    environment lets it.
    """
    children = [child for process in of_engine() if process.name().startswith("ray::") for child in process.children()]
    found = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    return sorted(found, key=psutil.Process.create_time)


def poll_on(pool: RayPool) -> None:
    for _ in range(1000):  # of half a second while anything is in flight, and of no time at all when that was forgotten
        pool.poll()


def is_loopback(address: str) -> bool:
    ip: IPv4Address | IPv6Address = ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def test_a_push_reaches_every_worker_and_together_they_sample_what_one_process_does(pool, policy, expected):
    assert len(workers()) == 2
    pool.load(weights_in(policy), 1)
    responses = generate(pool, WANTED, SAMPLING)
    assert [response.token_ids for response in responses] == [response.token_ids for response in expected]
    assert {response.version for response in responses} == {1}
    for response, one in zip(responses, expected, strict=True):
        assert response.logprobs == pytest.approx(one.logprobs, rel=0, abs=NATS)


def test_a_cluster_of_the_runs_own_is_reached_from_this_machine_alone(pool):
    listening = [
        connection.laddr.ip
        for process in family()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert [address for address in listening if not is_loopback(address)] == []


def test_an_engine_one_of_whose_workers_dies_is_lost_and_ends_with_all_its_processes(pool):
    pool.submit(requests(16, 4, length=20), SAMPLING)  # more than it decodes together: they cannot have ended
    pool.poll()
    before = of_engine()
    last = workers()[-1]
    last.suspend()
    pool.poll()  # until the others wait for it inside a collective
    last.kill()
    with pytest.raises(RuntimeError, match="rollout engine 0 was lost"):
        poll_on(pool)
    pool.close()
    _, left = psutil.wait_procs(before, timeout=30)
    assert left == []
