"""Text generation with static shapes."""
