"""Asks what a run trained: python -m jaxrepro.sample --workdir=runs/NAME [--prompt=... --image=FILE]

Without a prompt the method takes questions of its own test data. Prints each answer as it is.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from jaxrepro import cli
from jaxrepro.config import LARGEST_SEED, UserError


def main(argv: Sequence[str]) -> None:
    """The command; raises UserError for bad input."""
    parser = flags.FlagValues()
    text = {"flag_values": parser}
    flags.DEFINE_string("workdir", None, "folder of a run of jaxrepro.launch", **text)
    flags.DEFINE_string("prompt", None, "the question; default: questions of the test data", **text)
    flags.DEFINE_string("image", None, "image file that the question is about", **text)
    flags.DEFINE_integer("n", 1, "number of answers", lower_bound=1, **text)
    flags.DEFINE_float(
        "temperature",
        None,
        "0 = greedy; default: greedy for one answer, else the run's own sampling temperature",
        lower_bound=0.0,
        **text,
    )
    bounds = dict(lower_bound=0, upper_bound=LARGEST_SEED)
    flags.DEFINE_integer("seed", 0, "the same seed gives the same answers", **bounds, **text)
    cli.distributed_flags(parser)
    cli.parse_flags(parser, argv, __doc__)
    workdir = parser["workdir"].value
    config = cli.trained(workdir)
    check_image(parser["image"].value)
    method = cli.method(config)
    if not hasattr(method, "sample"):
        raise UserError(f"{config.method} produces no samples; use jaxrepro.evaluate")
    cli.setup_jax()
    cli.join(parser)
    cli.fit_mesh(config)
    names = ("prompt", "image", "n", "temperature", "seed")
    answers = method.sample(config, workdir, **{name: parser[name].value for name in names})
    cli.say("\n\n".join(answers))


def check_image(path: str | None) -> None:
    """Raises UserError unless Pillow can read the file."""
    if path is None:
        return
    from PIL import Image

    if not Path(path).is_file():
        raise UserError(f"--image={path} does not exist")
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "it is damaged or of an unknown format"
        if isinstance(e, PermissionError):
            reason = "permission denied"
        raise UserError(f"--image={path} cannot be read: {reason}; use a PNG or JPEG") from e


if __name__ == "__main__":
    cli.main(main)
