"""What a verl job would do with krpo and kpo: the settings in force, and what they meet in verl."""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_krpo.advantage import ESTIMATORS, settings_of
from verl_krpo.config import (
    KPO_AT,
    AdaptiveConfig,
    Choice,
    JspoConfig,
    KpoConfig,
    KrpoConfig,
    MemoryConfig,
    Objective,
    Weight,
    read,
)
from verl_krpo.doctor import data
from verl_krpo.doctor.finding import WRONG_JOB, Finding, exit_status
from verl_krpo.policy_loss import LOSSES

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
ESTIMATOR, LOSS = "algorithm.adv_estimator", f"{ACTOR}.policy_loss.loss_mode"
CORRECTION = "algorithm.rollout_correction"
SECTION = "This job"
IN_FORCE = (
    *(f"{ACTOR}.{key}" for key in ("loss_agg_mode", "clip_ratio", "clip_ratio_low", "clip_ratio_high")),
    *(f"{ACTOR}.{key}" for key in ("ppo_mini_batch_size", "optim.lr")),
    *(f"{ROLLOUT}.{key}" for key in ("name", "n")),
    "data.train_batch_size",
)


def look(overrides: list[str]) -> list[Finding]:
    """The settings in force of the job with these arguments of main_ppo, and its caveats; or why it would not start."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        # A job prints and warns as it composes; the report has its own words for that.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = compose(overrides)
            validate(config)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError, TypeError) as error:
        text = f"this job would not start: {reason(error)}"
        return [Finding("job", "failure", text, section=SECTION, code=WRONG_JOB)]
    in_force = [Finding(key, "setting", str(value), section=SECTION) for key, value in settings(config)]
    return in_force + caveats(config)


def compose(overrides: list[str]) -> DictConfig:
    """verl's config for main_ppo's own arguments (--config-path, --config-name and overrides)."""
    import hydra
    import verl  # noqa: F401 (loads the plugin)

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-path", "-cp", default="pkg://verl.trainer.config")
    parser.add_argument("--config-name", "-cn", default="ppo_trainer")
    options, rest = parser.parse_known_args(overrides)
    if options.config_path.startswith("pkg://"):
        where = hydra.initialize_config_module(options.config_path.removeprefix("pkg://"), version_base=None)
    else:
        where = hydra.initialize_config_dir(str(Path(options.config_path).resolve()), version_base=None)
    with where:
        return hydra.compose(options.config_name, overrides=rest)


def validate(config: DictConfig) -> None:
    """verl's own validation, with our guards in it, as on the driver."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


def settings(config: DictConfig) -> list[tuple[str, Any]]:
    """The keys that decide the method, with their values in force: (key, value) rows."""
    estimator, kpo = _methods(config)
    name = config.algorithm.adv_estimator
    rows = [(ESTIMATOR, name)] + _rows(f"algorithm.{name}", estimator)
    rows += [(LOSS, config.actor_rollout_ref.actor.policy_loss.loss_mode)] + _rows(KPO_AT, kpo)
    return rows + [(key, OmegaConf.select(config, key)) for key in IN_FORCE]


def _methods(config: DictConfig) -> tuple[Any, KpoConfig | None]:
    """The settings of our estimator and of kpo, None where the job does not use it."""
    algorithm, loss = config.algorithm, config.actor_rollout_ref.actor.policy_loss
    name = algorithm.adv_estimator
    estimator = settings_of(name, algorithm) if name in ESTIMATORS else None
    return estimator, read(KpoConfig, loss.get("kpo"), KPO_AT) if loss.loss_mode == "kpo" else None


def _rows(at: str, values: Any) -> list[tuple[str, Any]]:
    return [(f"{at}.{key}", getattr(value, "value", value)) for key, value in vars(values).items()] if values else []


def reason(error: Exception) -> str:
    """Hydra's message with its cause, without its internals and without its advice to add an unknown key by force."""
    lines = [line.strip() for cause in (error, error.__cause__) if cause for line in str(cause).splitlines()]
    skipped = ("full_key:", "object_type=", "To append to your config")
    text = " / ".join(line for line in lines if line and not line.startswith(skipped))
    for cls in (*(estimator.keys for estimator in ESTIMATORS.values()), *LOSSES.values()):
        if f"not in '{cls.__name__}'" in text:
            text += f" (keys: {', '.join(cls.__dataclass_fields__)})"
    return text


class Caveat(NamedTuple):
    """A setting of verl's that changes what krpo or kpo does. text: `{value}` stands for the key's value."""

    key: str
    status: str
    applies: Callable[[Any, Any, DictConfig], Any]  # of the key's value, the method's own settings, and the job
    text: str


def _remembers(settings: Any) -> bool:
    return isinstance(settings, MemoryConfig)


def _selects(settings: Any) -> bool:
    return _remembers(settings) and settings.select == Choice.signal


def _filters(settings: Any) -> bool:
    """Its baseline knows the prompt's own group alone."""
    return isinstance(settings, KrpoConfig)


def _shrinks(settings: Any) -> bool:
    """Its baseline is fitted to the prompts of the batch that it sees."""
    return isinstance(settings, AdaptiveConfig | JspoConfig)


OF_ESTIMATORS = (
    Caveat(f"{ROLLOUT}.n", "warning", lambda n, own, job: n == 1 and _filters(own),
           "{value}: a group of one is compared with the prior mean only; use n >= 4, or +algorithm=krpo_memory"),
    Caveat(f"{ROLLOUT}.n", "note", lambda n, own, job: n == 1 and _shrinks(own) and not _remembers(own),
           "{value}: compared with the other prompts of the batch; +algorithm=krpo_memory adds the prompt's own past"),
    Caveat("algorithm.krpo.order", "warning", lambda _, own, job: _filters(own) and own.order == "arrival",
           "arrival: verl's rows arrive shortest first, so place follows length"),
    Caveat("trainer.balance_batch", "note", lambda moved, own, job: moved and _filters(own) and own.order != "arrival",
           "rows are moved; harmless, as krpo.order=shuffled follows no row order"),
    Caveat(f"{ACTOR}.grad_clip", "note", lambda clip, own, job: clip and _filters(own) and own.scale == "filter_std",
           "{value}: published KRPO advantages are several times GRPO's, so this clips far more often"),
    Caveat(f"{CORRECTION}.bypass_mode", "note",
           lambda on, own, job: on and getattr(own, "weight", Weight.none) != Weight.none,
           "responses are weighed by the log-probs of the rollout"),
    Caveat("algorithm.use_kl_in_reward", "warning", lambda on, own, job: on,
           "the KL penalty is part of the rewards that are filtered"),
    Caveat(f"{ROLLOUT}.multi_turn", "note", lambda turns, own, job: turns.enable,
           "a session counts once, by its final output; tool tokens are masked"),
    Caveat("algorithm.krpo_memory.select", "note",
           lambda _, own, job: _selects(own) and own.objective == Objective.signal,
           "{value}: prompts that are expected to teach nothing are left out until the forecast is unsure of them, so "
           "training is on other prompts than the data hold; objective=same weighs them so that it is not"),
    Caveat("algorithm.krpo_memory.objective", "note",
           lambda _, own, job: _selects(own) and own.objective == Objective.same,
           "{value}: advantages are multiplied by up to 10; krpo/effective_prompts says what a step is worth"),
    Caveat("algorithm.krpo_memory.allocate", "note",
           lambda _, own, job: _remembers(own) and own.allocate == Choice.signal,
           "{value}: a prompt gets 1 response or more, rollout.n on average; its advantages count inversely"),
    Caveat("algorithm.use_kl_in_reward", "warning", lambda on, own, job: on and _remembers(own) and own.chooses,
           "what a prompt teaches is judged as if its rewards were the lowest or highest so far, KL penalty included"),
    Caveat("algorithm.filter_groups", "note", lambda drop, own, job: drop and drop.enable and not _shrinks(own),
           "groups of equal rewards are dropped before krpo sees them"),
    Caveat("algorithm.filter_groups.enable", "warning", lambda on, own, job: on and _shrinks(own),
           "{value}: the groups it drops are what shrinking gains from; with it this is no better than rloo and weighs "
           "easy and hard prompts less. Set it to false, or algorithm.adv_estimator=rloo"),
    Caveat(f"{CORRECTION}.rollout_rs", "note", lambda on, own, job: on,
           "a response that is masked whole leaves its group"),
)  # fmt: skip
OF_KPO = (
    Caveat(f"{ACTOR}.ppo_mini_batch_size", "warning",
           lambda size, kpo, job: job.actor_rollout_ref.actor.ppo_epochs == 1 and size >= job.data.train_batch_size,
           "{value}: one update a batch: the ratio is 1 and kpo does nothing; make it smaller"),
    Caveat("data.max_response_length", "warning",
           lambda tokens, kpo, job: kpo.measurement_var != "batch" and _last_gain(kpo, tokens) < 1e-4,
           "{value}: the gain is below 1e-4 even there, kpo hardly moves; raise process_var for short responses"),
    Caveat(f"{ACTOR}.clip_ratio_low", "warning",
           lambda low, kpo, job: kpo.clip and (job.actor_rollout_ref.actor.clip_ratio if low is None else low) > 0.01,
           "{value}: the filtered ratio stays near 1; published are 3e-4 and 4e-4 (clip_ratio where it is None)"),
    Caveat(f"{CORRECTION}.bypass_mode", "note", lambda on, kpo, job: on,
           "old log-probs are the rollout's: their noise enters the ratio that kpo filters"),
    Caveat("distillation.enabled", "warning", lambda on, kpo, job: on,
           "kpo is the loss of the task rewards; distillation has its own beside it"),
    Caveat(f"{ACTOR}.loss_agg_mode", "note", lambda mode, kpo, job: mode != "seq-mean-token-mean",
           "{value}: published is seq-mean-token-mean"),
)  # fmt: skip


def caveats(config: DictConfig) -> list[Finding]:
    """A finding for each setting of verl's that changes what krpo or kpo does in this job."""
    estimator, kpo = _methods(config)
    if estimator is None and kpo is None:
        text = f"{config.algorithm.adv_estimator}, with {LOSS}={OmegaConf.select(config, LOSS)}"
        return [Finding(ESTIMATOR, "warning", f"{text}: this job uses neither KRPO nor KPO", section=SECTION)]
    findings = []
    for method, table in ((estimator, OF_ESTIMATORS), (kpo, OF_KPO)):
        for key, status, applies, text in table if method else ():
            if applies(value := OmegaConf.select(config, key), method, config):
                findings.append(Finding(key, status, text.format(value=value), section=SECTION))
    return findings + ([] if estimator is None else _recurrence(config, estimator))


def _recurrence(config: DictConfig, estimator: Any) -> list[Finding]:
    """How often a prompt comes back, which is what a memory lives on. Nothing where the data are not here."""
    rows, batch = data.train_rows(config), config.data.train_batch_size
    if not rows:
        return []
    steps = config.trainer.total_training_steps or rows // batch * config.trainer.total_epochs
    text = f"{rows} prompts, {batch} a step, {steps} steps: a prompt comes {steps * batch / rows:.3g} times"
    often = steps * batch >= 2 * rows
    if not _remembers(estimator):
        if not often or not _shrinks(estimator):
            return []
        return [Finding("data.train_files", "note", f"{text}; +algorithm=krpo_memory remembers it", section=SECTION)]
    from verl_krpo.plugin import next_batch  # here: doctor has to start where the plugin does not

    if estimator.chooses and (wrong := next_batch.unfit(estimator, rows, batch, steps)):
        return [Finding("data.train_files", "failure", wrong, section=SECTION, code=WRONG_JOB)]
    if _selects(estimator):
        text = f"{text}, and into the candidates {steps * batch * estimator.select_from / rows:.3g} times"
    status = "note" if often else "warning"
    advice = f", every {rows / batch:.3g} steps" if often else "; a memory helps from the second time on"
    return [Finding("data.train_files", status, text + advice, section=SECTION)]


def _last_gain(kpo: KpoConfig, tokens: int) -> float:
    from verl_krpo.kalman import LocalLevel
    from verl_krpo.kalman.sequence import schedule

    model = LocalLevel(kpo.process_var, kpo.measurement_var, 0.0, kpo.init_var)
    return schedule(model, kpo.gain, tokens)[-1].item()


def check(overrides: list[str]) -> int:
    """`verl-krpo check`: compose and validate, start nothing. A wrong key or value fails as it would on the driver."""
    findings = look(overrides)
    for finding in findings:
        if finding.code:
            print(finding.text, file=sys.stderr)
        elif finding.status == "setting":
            print(f"{finding.check} = {finding.text}")
    return 1 if exit_status(findings) else 0
