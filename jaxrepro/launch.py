"""Runs a method: python -m jaxrepro.launch --config=configs/NAME.py[:size] --config.key=value

`--list` shows the configs with their sizes, `--dry_run` what a run would need without starting it,
`--help` this text. On several machines start the same command on each (launch/README.md).
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from jaxrepro import cli
from jaxrepro import config as configuration
from jaxrepro.config import UserError


def _flags() -> flags.FlagValues:
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string("workdir", None, "folder of the run; default runs/<method>-<size>", **text)
    flags.DEFINE_enum(
        "resume",
        "auto",
        ["auto", "never", "must"],
        "auto (continue what the workdir holds), never (delete it and start again), must (continue, or stop)",
        **text,
    )
    flags.DEFINE_bool("dry_run", False, "print what the run would need, and stop", **text)
    flags.DEFINE_bool("list", False, "list configs, sizes, needs, minutes, and stop", **text)
    flags.DEFINE_string("profile", None, "start:count, the steps to trace with XProf", **text)
    cli.distributed_flags(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input and SystemExit for its exit codes."""
    parser = _flags()
    if cli.wants_help(argv):
        cli.parse_flags(parser, argv, __doc__)
    config, size, rest = configuration.take_config(argv)
    cli.parse_flags(parser, rest, __doc__)
    if parser["list"].value:
        return print(listing())
    if config is None:
        raise UserError("--config=configs/NAME.py[:size] is required; --list shows what there is")
    profile = check_profile(parser["profile"].value)
    workdir = parser["workdir"].value or f"runs/{config.method}-{size}"
    if parser["dry_run"].value:
        return print(dry_run(config, workdir))
    cli.exit_on_sigterm()
    method = cli.method(config)
    cli.setup_jax()
    cli.join(parser)
    cli.say(cli.banner())
    method.run(config, workdir, resume=parser["resume"].value, profile=profile)


def listing() -> str:
    """Table of config files, sizes, needs and minutes."""
    rows = [("config", "needs", "minutes")]
    for path in configuration.files():
        sizes = getattr(configuration.load_module(path), "SIZES", {})
        for size, about in sizes.items():
            name = f"configs/{path.name}:{size}"
            rows.append((name, str(about.get("needs", "")), str(about.get("minutes", ""))))
    if len(rows) == 1:
        raise UserError("no config files here; run from the root of a clone of the repository")
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows)


def check_profile(text: str | None) -> str | None:
    """The text itself if it is start:count; else a UserError, before anything is loaded."""
    if text is not None:
        start, _, count = text.partition(":")
        if not (start.isdecimal() and count.isdecimal() and int(count) > 0):
            raise UserError(f"--profile={text} is not start:count, such as --profile=10:3")
    return text


def dry_run(config: ConfigDict, workdir: str) -> str:
    """What a run would need, as text: no device, network or data file is touched."""
    from jaxrepro.train import memory

    plan = cli.method(config).plan(config)
    return "\n\n".join(
        [
            configuration.to_json(config),
            f"workdir: {workdir}",
            memory.render(plan),
        ]
    )


if __name__ == "__main__":
    cli.main(main)
