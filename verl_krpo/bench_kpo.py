"""What the KPO loss costs: `python -m verl_krpo.bench_kpo [--device cuda] [--rounds 25]` prints a Markdown table.

Forward and backward with every metric, against verl's `vanilla` and against the published loss, re-implemented from its
description. The calls of a round follow one another, each after an untimed one of its own, and the ratios are taken
within rounds, so that a busy machine slows both sides alike. One thread on a CPU.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from verl_krpo.bench import peak_bytes
from verl_krpo.config import Gain, KpoConfig

SHAPES = ((8, 4096), (8, 16384), (2, 131072))
MODE = "seq-mean-token-mean"


class _Config(SimpleNamespace):
    def get(self, key, default=None):
        return getattr(self, key, default)


def actor_config(kpo: KpoConfig | None = None) -> _Config:
    """As much of verl's actor config as the losses read, with KPO's clip range."""
    return _Config(
        clip_ratio=0.2,
        clip_ratio_low=3e-4,
        clip_ratio_high=4e-4,
        clip_ratio_c=3.0,
        global_batch_info={},
        policy_loss=_Config(kpo=kpo),
    )


def published_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config):
    """The published loss from its description, everything that it computes included.

    Its filter, in float32: with cosh eta = 1 + q/2, q = Q/R and U_n = sinh(n eta) / sinh(eta),

        K_t = q U_t / (U_t (q + 1) - U_{t-1}),    A_t = prod_{j<=t} (1 - K_j),    x_t = A_t sum_{s<=t} K_s z_s / A_s

    K_t is held within [1e-6, 1 - 1e-6], A_t is exp of a cumulative sum of logarithms, P_t = R K_t is spread over the
    rows, and a masked token observes 0. It logs the mean filtered ratio beside what verl's losses log, and takes the
    unfiltered ratio and that mean once more for its debugging output.
    """
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.torch_functional import masked_mean

    q = torch.tensor(1e-6, device=log_prob.device)
    log_ratio = log_prob - old_log_prob
    with torch.no_grad():
        seen = response_mask.float()
        z = log_ratio.detach() * seen
        eta = torch.log(1 + q / 2 + torch.sqrt(torch.clamp((1 + q / 2) ** 2 - 1, min=0.0)))
        u = torch.sinh(torch.arange(1, z.shape[1] + 1, device=z.device) * eta) / torch.sinh(eta)
        u_before = torch.cat([u.new_zeros(1), u[:-1]])
        gain = (q * u / (u * (q + 1) - u_before)).clamp(1e-6, 1 - 1e-6)
        _variance = gain.expand_as(z) * seen
        log_fall = (1 - gain).log().cumsum(0)
        fall, rise = log_fall.exp(), (-log_fall).exp()
        filtered = fall * (z * (gain * rise)).cumsum(dim=-1) * seen
    ratio = (log_prob - log_prob.detach() + filtered).clamp(max=10.0).exp()
    loss = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    total = agg_loss(torch.maximum(loss, bounded), response_mask, loss_agg_mode)
    clipfrac = masked_mean((bounded > loss).float(), response_mask)
    kl = masked_mean(-(log_prob - old_log_prob), response_mask)
    metrics = {
        "actor/pg_clipfrac": clipfrac.item(),
        "actor/ppo_kl": kl.item(),
        "actor/pg_clipfrac_lower": 0.0,
        "actor/sequence_ratio_mean": ratio.detach().mean().item(),
    }
    _debug = log_ratio.exp().detach(), ratio.detach().mean().item(), clipfrac.item()
    return total, metrics


def losses() -> dict[str, Callable]:
    """What is compared, by name; each takes (old_log_prob, log_prob, advantages, response_mask)."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    from verl_krpo.policy_loss.kpo import compute_policy_loss

    def bound(loss, kpo=None):
        config = actor_config(kpo)
        return lambda *tensors: loss(*tensors, MODE, config)

    return {
        "vanilla": bound(compute_policy_loss_vanilla),
        "published": bound(published_loss),
        "kpo": bound(compute_policy_loss),
        "kpo, clip=false": bound(compute_policy_loss, KpoConfig(clip=False)),
        "kpo, gain=steady": bound(compute_policy_loss, KpoConfig(gain=Gain.steady)),
        "kpo, measurement_var=batch": bound(compute_policy_loss, KpoConfig(measurement_var="batch")),
        "kpo, innovation_clip=3": bound(compute_policy_loss, KpoConfig(measurement_var=1e-4, innovation_clip=3.0)),
    }


def batch(rows: int, width: int, holes: bool, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Responses of width/2 to width tokens, log-ratios of standard deviation 0.01; `holes`: a tenth is masked."""
    make = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=make)
    new = old + 0.01 * torch.randn(rows, width, generator=make)
    advantages = torch.randn(rows, 1, generator=make).repeat(1, width)
    mask = torch.arange(width) < torch.randint(width // 2, width + 1, (rows, 1), generator=make)
    if holes:
        mask &= torch.rand(rows, width, generator=make) > 0.1
    return old.to(device), new.to(device).requires_grad_(), advantages.to(device), mask.to(device)


def step(loss: Callable, tensors: tuple[torch.Tensor, ...]) -> None:
    """One forward and backward pass."""
    loss(*tensors)[0].backward()
    tensors[1].grad = None


def paired_times(calls: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every call in each of `rounds` rounds, after two rounds that are thrown away."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            call()  # untimed: what the call before it left in caches and allocator is not this one's cost
            wait()
            start = time.perf_counter()
            call()
            wait()
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def table(rounds: int, device: str) -> str:
    """Of a forward and backward pass the fastest time, the ratio of fastest times and, in brackets, the median of the
    ratios within a round; the peak memory by the log-prob tensor's size."""
    lines = [
        "| rows x tokens | mask | loss | ms | / vanilla | / published | peak memory / log-probs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for rows, width in SHAPES:
        for holes in (False, True):
            tensors = batch(rows, width, holes, device)
            calls = {name: functools.partial(step, loss, tensors) for name, loss in losses().items()}
            if holes:
                calls = {name: calls[name] for name in ("vanilla", "published", "kpo")}
            times = paired_times(calls, rounds, device)
            for name, call in calls.items():
                memory = peak_bytes(call, device) / (tensors[1].numel() * tensors[1].element_size())
                against = [ratios(times[name], times[other]) for other in ("vanilla", "published")]
                mask, time_ms = "holes" if holes else "padding", min(times[name]) * 1e3
                cells = [f"{fastest:.2f} ({median:.2f})" for fastest, median in against]
                lines.append(
                    f"| {rows} x {width:,} | {mask} | {name} | {time_ms:.2f} | {' | '.join(cells)} | {memory:.2f} |"
                )
    return "\n".join(lines)


def ratios(times: list[float], reference: list[float]) -> tuple[float, float]:
    """Ratio of the fastest times, and the median of the ratios taken round by round."""
    return min(times) / min(reference), statistics.median(a / b for a, b in zip(times, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(table(arguments.rounds, arguments.device))


if __name__ == "__main__":
    main()
