"""Names of the metrics that KRPO and KPO log."""

KRPO = {
    "krpo/reward_mean",
    "krpo/baseline_mean",
    "krpo/gain_first",
    "krpo/gain_last",
    "krpo/advantage_std",
    "krpo/advantage_abs_first_over_last",
    "krpo/measurement_var",
    "krpo/prior_mean",
    "krpo/prior_var",
    "krpo/nis",
    "krpo/groups",
    "krpo/group_size_min",
    "krpo/singletons",
}
KPO = {
    "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl",
    "actor/kpo_ratio_std_raw", "actor/kpo_ratio_std_filtered", "actor/kpo_ratio_max_raw",
    "actor/kpo_logratio_abs_mean_raw", "actor/kpo_logratio_abs_mean_filtered",
    "actor/kpo_gain_last", "actor/kpo_measurement_var", "actor/kpo_innovation_clipfrac",
    "actor/kpo_switch_raw", "actor/kpo_switch_filtered",
}  # fmt: skip
