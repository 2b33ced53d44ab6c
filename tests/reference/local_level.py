"""The local-level model by the joint Gaussian, and its filter in plain Python, one observation after the other."""

import math

import numpy as np
import torch


def dense(z, which, process_var, measurement_var, init_mean, init_var):
    """Mean and variance of x_i for every i given the observations in which[i], by conditioning the joint Gaussian.

    Cov(x_i, x_j) = P0 + Q min(i, j), Cov(z_i, z_j) = Cov(x_i, x_j) + R_i [i = j], with i, j from 1. z: (n,).
    measurement_var: R, or R_i. which: for every belief wanted a pair (i, indices), 0-based; i = -1 is x_0.
    """
    z, n = np.asarray(z, dtype=float), len(z)
    steps = np.arange(n + 1)
    state = init_var + process_var * np.minimum.outer(steps, steps)  # x_0 .. x_n
    noisy = state[1:, 1:] + np.diag(np.broadcast_to(measurement_var, n))
    beliefs = []
    for i, known in which:
        known = list(known)
        cross = state[i + 1, 1:][known]
        weights = np.linalg.solve(noisy[np.ix_(known, known)], cross) if known else np.zeros(0)
        mean = init_mean + weights @ (z[known] - init_mean)
        beliefs.append((mean, state[i + 1, i + 1] - weights @ cross))
    return np.array(beliefs).reshape(-1, 2)


def conditions(name, n):
    """What each belief of `kalman.filter` is about, and what it knows: (i, indices) for i = 0..n-1."""
    everything = range(n)
    return {
        "filtered": [(i, range(i + 1)) for i in everything],
        "predicted": [(i, range(i)) for i in everything],
        "smoothed": [(i, everything) for i in everything],
        "leave_one_out": [(i, [j for j in everything if j != i]) for i in everything],
        "posterior": [(n - 1, everything)],
    }[name]


def log_likelihood(z, process_var, measurement_var, init_mean, init_var):
    """log N(z; m0, Cov(z))."""
    z, n = np.asarray(z, dtype=float), len(z)
    steps = np.arange(1, n + 1)
    cov = init_var + process_var * np.minimum.outer(steps, steps) + measurement_var * np.eye(n)
    _, logdet = np.linalg.slogdet(cov)
    return -0.5 * (n * math.log(2 * math.pi) + logdet + (z - init_mean) @ np.linalg.solve(cov, z - init_mean))


def sequential(z, mask, process_var, measurement_var, init_mean=0.0, init_var=0.0, steady=False, kappa=math.inf):
    """x_{t|t}, P_{t|t} and the side on which an innovation saturates at kappa sigma: (rows, time), by plain floats."""
    mean, var = (torch.zeros(z.shape, dtype=torch.float64) for _ in range(2))
    side = torch.zeros(z.shape, dtype=torch.int8)
    for row in range(z.shape[0]):
        x, p = init_mean, init_var
        if steady:
            p = (-process_var + math.sqrt(process_var**2 + 4 * process_var * measurement_var)) / 2
        for t in range(z.shape[1]):
            if mask is None or mask[row, t]:
                ahead = p + process_var
                innovation, sigma = float(z[row, t]) - x, math.sqrt(ahead + measurement_var)
                bound = kappa * sigma
                side[row, t] = (innovation > bound) - (innovation < -bound)
                x += ahead / (ahead + measurement_var) * min(max(innovation, -bound), bound)
                p = p if steady else measurement_var * ahead / (ahead + measurement_var)
            mean[row, t], var[row, t] = x, p
    return mean, var, side
