"""The environment of a run: `eval "$(python -m launch.environment --platform npu --nodes 2)"`, or `--explain`.

What the user exported wins, unless it contradicts the run: then it is refused. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from launch.contradictions import check
from launch.sites import PLATFORMS, Role, Site, site_of
from launch.variables import TABLE, Variable

ROLLOUT = "DAPO_ROLLOUT_ENVIRONMENT"  # JSON: what engines in processes of their own need otherwise than the trainer


def rows(site: Site, role: Role) -> dict[str, Variable]:
    """The rows that apply, by name."""
    return {row.name: row for row in TABLE if row.applies(site, role)}


def environment(site: Site, role: Role, given: Mapping[str, str]) -> dict[str, str]:
    """What a process of this role has to have: for each variable the user's value in `given`, else the table's.

    Where trainer and engines need different values, the user's is for the trainer: engines in processes of their own
    keep the table's.
    """
    of_trainer = rows(site, Role.trainer) if role is Role.rollout else {}
    values: dict[str, str] = {}
    for name, row in rows(site, role).items():
        value = row.value_at(site)
        is_split = name in of_trainer and of_trainer[name].value_at(site) != value
        chosen = value if is_split else given.get(name, value)
        if chosen is not None:
            values[name] = chosen
    return values


def checked_environment(site: Site, given: Mapping[str, str]) -> dict[str, str]:
    """What a launcher sets for the processes it starts.

    Raises:
        ValueError: the environment contradicts itself or the run, with the way out.
    """
    role = site.roles[0]
    values = environment(site, role, given)
    check(site, role, {**given, **values}, needed=[row.name for row in rows(site, role).values() if row.is_needed])
    if site.engines_apart:
        engines = environment(site, Role.rollout, given)
        check(site, Role.rollout, {**given, **values, **engines}, needed=[])
        if different := {name: value for name, value in engines.items() if values.get(name) != value}:
            values[ROLLOUT] = json.dumps(different)
    return values


def exports(values: Mapping[str, str]) -> str:
    """For a shell."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def explain(site: Site, given: Mapping[str, str]) -> str:
    """The whole table: first what holds here, with its value, then the rest."""
    values = {role: environment(site, role, given) for role in site.roles}
    here = {row: role for row in TABLE for role in site.roles if row.applies(site, role)}
    title = f"platform {site.platform}, {site.nodes} node{'s' * (site.nodes > 1)}; * marks a value of yours"
    lines = [title]
    for row, role in here.items():
        value = values[role].get(row.name)
        lines.append(_describe(row, value, value is not None and given.get(row.name) == value))
    rest = [_describe(row, row.value_at(site), False) for row in TABLE if row not in here]
    return "\n".join([*lines, "\nnot here:", *rest])


def _describe(row: Variable, value: str | None, is_users: bool) -> str:
    state = f"{row.name} unset" if value is None else f"{row.name}={shlex.quote(value)}{' *' * is_users}"
    roles = [] if len(row.roles) == len(Role) else ["in " + " and ".join(role.value for role in row.roles)]
    platforms = [] if row.platforms == PLATFORMS else ["on " + " and ".join(row.platforms)]
    where = ", ".join([*roles, *platforms, *([row.condition.text] if row.condition.text else [])])
    return f"{state}\n    {where or 'everywhere'}: {row.reason}"


def add_site_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", choices=("auto", *PLATFORMS), default="auto")
    parser.add_argument("--nodes", type=int, default=1, help="machines of the run")
    parser.add_argument("--interface", default="", help="network interface on which the nodes see each other")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.environment", description="The environment of a run.")
    add_site_options(parser)
    parser.add_argument("--explain", action="store_true", help="the table, instead of lines for a shell")
    given, options = parser.parse_known_args(arguments)
    site = site_of(given.platform, given.nodes, given.interface, options)
    if given.explain:
        print(explain(site, os.environ))
        return 0
    try:
        print(exports(checked_environment(site, os.environ)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
