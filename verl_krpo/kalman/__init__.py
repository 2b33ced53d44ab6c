"""The scalar local-level Kalman model on torch tensors: no reward, token or verl in sight.

`filtered`, `predicted`, `innovations`, `posterior`, `smoothed`, `leave_one_out` and `log_likelihood` walk through short
rows step by step; `filtered_mean` is for rows of up to hundreds of thousands of observations.
"""

from .filter import filtered, innovations, leave_one_out, log_likelihood, posterior, predicted, smoothed  # noqa: F401
from .local_level import Belief, LocalLevel, gains, steady_gain  # noqa: F401
from .sequence import filtered_mean  # noqa: F401
