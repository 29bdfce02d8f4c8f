"""Models as plain pytrees: `init(key, cfg)`, `apply(params, cfg, ...)`."""
