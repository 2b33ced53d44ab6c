"""The scalar local-level Kalman model on torch tensors: `filter` for short rows, `sequence` for long ones."""

from .filter import filtered, innovations, leave_one_out, log_likelihood, posterior, predicted, smoothed  # noqa: F401
from .local_level import Belief, LocalLevel, gains, steady_gain  # noqa: F401
from .sequence import filtered_mean  # noqa: F401
