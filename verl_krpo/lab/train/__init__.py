"""Does a method train better? A tiny model learns in this process, under one method after the other.

loop.py        sample, score, update: one run
tasks.py       what is asked, what is right, and the model that training begins with
conditions.py  what a run is: task, prompts, group size, noise, what recurs, updates a batch
methods.py     every method by its name: rewards to advantages, and which loss they enter
losses.py      policy losses: verl's own and the product's
gradient.py    signal and variance of the gradient itself
pretrained.py  a pretrained model in the place of the tiny one: a transformers folder, of which the last layers learn
study.py       many runs in parallel processes, resumable, one CSV line each
compare.py     the main table: all tasks, every estimator at its best learning rate
choose.py      which prompts a step rolls out, and how many responses each gets
clipped.py     where along a response a policy loss clips
rounds.py      answers of any length, from a model that is cheap at every length
results.py     means, paired differences, rollouts to a threshold; figures
"""
