"""Would this job run? What `verl-krpo doctor`, `verl-krpo preflight` and `verl-krpo check` look at."""
