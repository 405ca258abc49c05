"""Dynamic sampling on simulated engines: what filling a batch costs, by strategy. No model is run.

    python -m tools.simulate --pass-rate 0.5            a table
    python -m tools.simulate --pass-rate 0.5 --json     the same as a list of objects
    python -m tools.simulate --sweep                    8 to 1,024 engines, pass rates 0.1 to 0.9

Strategies: `in_order` is the driver of dapo_mcore/rollout itself; `full_batch_refill` does as verl's recipe,
`one_for_one` as OpenRLHF, `first_finished` as slime (tools/simulation/peers.py). Engines batch continuously, under a
virtual clock (engine.py); lengths are heavy-tailed and longer for harder prompts (workload.py).

Figures, over `--steps` steps after one that is not counted:

generated_per_trained  tokens sampled, aborted responses included, per token of the committed groups
step_time_s            virtual seconds from a step's first request until its batch is determined; rollout alone, mean
length_bias            mean response length of the committed groups relative to that of all passing groups, minus 1;
                       of the prompts that were launched, with those whose responses were aborted
length_bias_error      standard error of length_bias, had as many of the passing groups been chosen blindly
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, when called as a file

from tools.simulation.engine import Cost
from tools.simulation.measure import STRATEGIES, Figures, Setting, measure
from tools.simulation.workload import Workload

ENGINES = (8, 32, 128, 512, 1024)
PASS_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    figures = (measure(name, setting) for setting in settings(options) for name in options.strategies)
    if options.json:
        print(json.dumps([asdict(one) for one in figures], indent=2))
    else:
        for line in table(figures):
            print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n")
    result = argparse.ArgumentParser(
        "python -m tools.simulate", None, summary, details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--pass-rate", type=float, nargs="+", default=[0.5], help="share of groups that pass the filter")
    add("--engines", type=int, nargs="+", default=[8], help="replicas")
    add("--sweep", action="store_true", help=f"engines {ENGINES} and pass rates {PASS_RATES}")
    add("--prompts", type=int, default=512, help="groups a step trains on")
    add("--group-size", type=int, default=16, help="responses per prompt")
    add("--mean-tokens", type=float, default=4_000, help="of a response")
    add("--max-tokens", type=int, default=20_480, help="longer responses are cut")
    add("--max-num-seqs", type=int, default=256, help="sequences a replica decodes together")
    add("--steps", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="NAME")
    add("--json", action="store_true")
    return result


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    for pass_rate in PASS_RATES if options.sweep else options.pass_rate:
        for engines in ENGINES if options.sweep else options.engines:
            yield Setting(
                Workload(pass_rate, options.group_size, options.mean_tokens, options.max_tokens, options.seed),
                options.prompts,
                engines,
                Cost(max_num_seqs=options.max_num_seqs),
                options.steps,
            )


def table(figures: Iterable[Figures]) -> Iterator[str]:
    yield f"{'pass rate':>9} {'engines':>7}  {'strategy':<18} {'generated/trained':>17} {'step time':>10}  length bias"
    for one in figures:
        bias = f"{one.length_bias:+7.1%} ± {one.length_bias_error:.1%}"
        yield (
            f"{one.pass_rate:9g} {one.engines:7}  {one.strategy:<18} {one.generated_per_trained:17.2f} "
            f"{one.step_time_s:8.0f} s  {bias}"
        )


if __name__ == "__main__":
    main()
