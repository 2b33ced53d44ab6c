"""Does an estimator train better? A tiny model learns sums in this process, under one method after the other.

lab.py         sample, score, update: one run
methods.py     rewards to advantages, every method by its name
conditions.py  what a run is: prompts, group size, noise, what recurs
study.py       many runs in parallel processes, resumable, one CSV line each
report.py      means, paired differences, rollouts to a threshold; figures
"""
