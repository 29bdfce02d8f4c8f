"""`python -m jaxrepro.bench NAME`."""

from jaxrepro import cli
from jaxrepro.bench.harness import main

if __name__ == "__main__":
    cli.main(main)
