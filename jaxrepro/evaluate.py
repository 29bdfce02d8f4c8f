"""Evaluates what a run trained: python -m jaxrepro.evaluate --workdir=runs/NAME [--split=test]

Prints one metric a line, with its interval where the method reports one. Nothing is retrained.
"""

from collections.abc import Mapping, Sequence

from absl import flags

from jaxrepro import cli
from jaxrepro.config import UserError


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input."""
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string("workdir", None, "folder of a run of jaxrepro.launch", **text)
    flags.DEFINE_string("split", "test", "split of the run's data", **text)
    flags.DEFINE_integer(
        "n", None, "number of examples; default: the run's eval.n", lower_bound=1, **text
    )
    cli.distributed_flags(parser)
    cli.parse_flags(parser, argv, __doc__)
    workdir = parser["workdir"].value
    config = cli.trained(workdir)
    method = cli.method(config)
    if not hasattr(method, "evaluate"):
        raise UserError(f"{config.method} has no evaluation")
    cli.setup_jax()
    cli.join(parser)
    cli.fit_mesh(config)
    metrics = method.evaluate(config, workdir, split=parser["split"].value, n=parser["n"].value)
    cli.say(table(metrics))


def table(metrics: Mapping[str, float]) -> str:
    """One metric a line; `_lo` and `_hi` beside their estimate."""
    bounds = {f"{key}{end}" for key in metrics for end in ("_lo", "_hi")}
    rows = []
    for key in sorted(metrics.keys() - bounds):
        lo, hi = metrics.get(f"{key}_lo"), metrics.get(f"{key}_hi")
        interval = "" if lo is None or hi is None else f"  [{lo:.4g}, {hi:.4g}]"
        rows.append(f"{key:<32} {metrics[key]:.4g}{interval}")
    return "\n".join(rows)


if __name__ == "__main__":
    cli.main(main)
