"""Array operations: attention, log-probabilities, sampling."""
