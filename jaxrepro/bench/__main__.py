"""`python -m jaxrepro.bench NAME`."""

from jaxrepro.bench.harness import main

if __name__ == "__main__":
    main()
