"""Scoring functions that verl calls through custom_reward_function.path."""
