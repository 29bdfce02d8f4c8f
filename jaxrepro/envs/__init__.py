"""Environments as pure functions: `multi_agent` is the interface of many agents, `wrappers` turn it into others."""
