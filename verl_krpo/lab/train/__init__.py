"""Does an estimator train better? A tiny model learns sums in this process, under one method after the other.

on_policy.py   sample, score, update: one run
methods.py     rewards to advantages, every method by its name
conditions.py  what a run is: prompts, group size, noise, what recurs
off_policy.py  the same of policy losses, with many updates a batch
gradient.py    signal-to-noise of the gradient itself
study.py       many runs in parallel processes, resumable, one CSV line each
results.py     means, paired differences, rollouts to a threshold; figures
"""
