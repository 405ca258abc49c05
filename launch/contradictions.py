"""Environments that cannot work, each with variable, value, reason and way out. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from launch.sites import Role, Site, is_loopback
from launch.variables import PROCESS_GROUP_TIMEOUT_S

Environment = Mapping[str, str]
Rule = Callable[[Site, Role, Environment], Iterator[str]]

EXPANDABLE = "expandable_segments:true"
HCCL_TIMEOUTS = ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
HCCL_SHORTEST_CONNECT_S = 120
PORT_RANGES = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE")


def check(site: Site, role: Role, environment: Environment, needed: Sequence[str]) -> None:
    """Raises ValueError for the first contradiction of a process of this role; `needed` are variables it must have."""
    for rule in RULES:
        for found in rule(site, role, environment):
            raise ValueError(found)
    for name in needed:
        if not environment.get(name):
            raise ValueError(
                f"{name}: is not set, and {site.nodes} nodes must know on which network they see each other; give the "
                f"launcher --interface NAME, or export {name} (`ip -o -4 addr` lists the names)"
            )
        if site.nodes > 1 and environment[name] == "lo" and not is_loopback(environment.get("MASTER_ADDR", "")):
            raise ValueError(f"{name}=lo: the loopback interface reaches no other node; name another (`ip -o -4 addr`)")


def in_process_engine(site: Site, role: Role, environment: Environment) -> Iterator[str]:
    value = environment.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if role is not Role.trainer and value != "0":
        yield f"VLLM_ENABLE_V1_MULTIPROCESSING={value}: an engine lives in the process that writes weights; unset it"


def expandable_segments(site: Site, role: Role, environment: Environment) -> Iterator[str]:
    names = [name for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if environment.get(name)]
    if site.platform != "npu":
        return
    if len(names) > 1:
        yield (
            f"{names[0]}={environment[names[0]]} and {names[1]}={environment[names[1]]}: torch_npu takes one of them; "
            f"unset {names[1]}"
        )
    for name in names:
        if role is not Role.trainer and EXPANDABLE in environment[name].lower().replace(" ", ""):
            yield (
                f"{name}={environment[name]}: an engine in sleep mode refuses expandable segments; unset it, or move "
                "the engines out of the trainer with rollout.backend=ray and set PYTORCH_NPU_ALLOC_CONF"
            )


def task_queue(site: Site, role: Role, environment: Environment) -> Iterator[str]:
    value = environment.get("TASK_QUEUE_ENABLE", "1")
    if site.platform == "npu" and role is not Role.trainer and site.graphs and value not in ("0", "1"):
        yield (
            f"TASK_QUEUE_ENABLE={value}: engines that capture graphs need 0 or 1; unset it, or sample without graphs: "
            "rollout.enforce_eager=true"
        )


def weight_format(site: Site, role: Role, environment: Environment) -> Iterator[str]:
    value = environment.get("VLLM_ASCEND_ENABLE_NZ", "0")
    if site.platform == "npu" and role is not Role.trainer and value != "0":
        yield (
            f"VLLM_ASCEND_ENABLE_NZ={value}: weights in a fractal format cannot be updated while the engine lives; "
            "unset it"
        )


def timeouts(site: Site, role: Role, environment: Environment) -> Iterator[str]:
    for name in HCCL_TIMEOUTS:
        value = environment.get(name, "")
        if site.platform != "npu" or not value:
            continue
        if not value.isdigit():
            yield f"{name}={value}: expected whole seconds; unset it for the default"
        elif int(value) >= PROCESS_GROUP_TIMEOUT_S:
            yield (
                f"{name}={value}: the process group gives up after {PROCESS_GROUP_TIMEOUT_S} s, before HCCL can name "
                f"the cause; use less than {PROCESS_GROUP_TIMEOUT_S}"
            )
        elif name == HCCL_TIMEOUTS[0] and int(value) < HCCL_SHORTEST_CONNECT_S:
            yield f"{name}={value}: HCCL takes no less than {HCCL_SHORTEST_CONNECT_S} s; use that or more"


def ports(site: Site, role: Role, environment: Environment) -> Iterator[str]:
    """HCCL's two port ranges and the port of the rendezvous must not meet."""
    if site.platform != "npu":
        return
    taken: list[tuple[str, str, range]] = []
    for name in (*PORT_RANGES, "MASTER_PORT"):
        value = environment.get(name, "")
        if not value:
            continue
        if (span := port_span(value)) is None:
            yield f"{name}={value}: expected ports between 1 and 65535, as 60000-60050; unset it for the default"
            continue
        for other, text, reserved in taken:
            if max(span.start, reserved.start) < min(span.stop, reserved.stop):
                yield f"{name}={value}: overlaps {other}={text}; move one of them"
        taken.append((name, value, span))


def port_span(text: str) -> range | None:
    """Of `first-last` or of one port; None when it is neither."""
    first, _, last = text.partition("-")
    last = last or first
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        return None
    return range(int(first), int(last) + 1)


RULES: tuple[Rule, ...] = (in_process_engine, expandable_segments, task_queue, weight_format, timeouts, ports)
