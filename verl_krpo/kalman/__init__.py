"""The scalar local-level Kalman model: torch only, no reward, token or verl in sight."""
