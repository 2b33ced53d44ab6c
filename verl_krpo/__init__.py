"""KRPO and KPO for verl: Kalman-filtered advantages and importance ratios.

Importing this package costs nothing. verl loads `verl_krpo.plugin` through the entry point group `verl.plugins`.
"""

__version__ = "0.1.0"
