"""Answer checkers: `reward(example, text) -> {name: value}`, on the host."""
