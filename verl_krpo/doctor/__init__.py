"""Would this job run? What `verl-krpo doctor`, `verl-krpo preflight` and `verl-krpo check` look at.

Every look gives findings. What keeps the plugin or a job from working is a failure; doctor's have exit statuses:

    10  verl-krpo is not installed (its entry point is not visible to verl)
    11  the plugin's import fails
    12  VERL_USE_EXTERNAL_PLUGINS hides the plugin
    13  verl is missing, too old, or does not load entry points
    14  the job's settings are wrong (a typo in a key, a value out of range)
    15  a Ray worker has no plugin
"""
