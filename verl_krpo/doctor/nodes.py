"""The Ray cluster that a job would join: is it there, is it large enough, what does each of its nodes have?"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from verl_krpo.backends import on_cpu
from verl_krpo.doctor import probe
from verl_krpo.doctor.finding import NOT_IN_WORKER, Finding
from verl_krpo.doctor.installation import verdict

JOIN_SECONDS, NODE_SECONDS, RAY_SECONDS = 60, 180, 240
HOW_TO_START = (
    "bash scripts/ray_head.sh on one node, bash scripts/ray_worker.sh HEAD_IP on the others; RAY_ADDRESS=auto"
)


def ask(address: str | None = None, nnodes: int = 1, gpus: int = 0, paths: tuple[str, ...] = ()) -> list[Finding]:
    """`look` in a process of its own, killed after RAY_SECONDS: ray.init can wait forever for a cluster that died."""
    arguments = json.dumps([address, nnodes, gpus, list(paths)])
    command = [sys.executable, "-m", "verl_krpo.doctor.nodes", arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=RAY_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        fix = "start it; or end what is left of one that died: `ray stop --force` on every node"
        return [_failure(f"no answer from Ray within {RAY_SECONDS} s ({_named(address)}): a job would wait too", fix)]
    if process.returncode:
        return [_failure(f"asking Ray fails ({_named(address)})", HOW_TO_START, detail=errors)]
    return [Finding(**finding) for finding in json.loads(output.splitlines()[-1])]


def look(address: str | None, nnodes: int, gpus: int, paths: list[str]) -> list[Finding]:
    """The cluster at this address, as verl would find it (None): `nnodes` nodes with as many `gpus`, and on each node
    the plugin and the `paths`."""
    import ray
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    # As in a verl job: RAY_ADDRESS decides, then a cluster that runs here; without a GPU always one of its own.
    if address is None and on_cpu() and not os.environ.get("RAY_ADDRESS"):
        address = "local"
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address, runtime_env=get_ppo_ray_runtime_env(), **quiet)
    except ConnectionError as error:
        fix = f"{HOW_TO_START}; where Ray asks for a token: RAY_AUTH_MODE=token and the head's ~/.ray/auth_token"
        return [_failure(f"no answer from Ray ({_named(address)}): {str(error).splitlines()[0]}", fix)]
    try:
        findings = []
        until = time.monotonic() + JOIN_SECONDS
        while (able := _able(gpus)) < nnodes and time.monotonic() < until:
            print(f"waiting for Ray nodes: {able} of {nnodes}", file=sys.stderr)
            time.sleep(5)
        if able < nnodes:
            wanted = f"{nnodes} nodes with {gpus} GPUs each asked for"
            findings.append(_failure(f"{wanted}; Ray ({_named(address)}) has {able}", HOW_TO_START))
        plugins, absences = on_every_node(probe.registered), on_every_node(probe.absent, paths)
        for host, answer in plugins:
            finding = verdict(answer, f"a Ray worker on {host}", NOT_IN_WORKER)
            if finding.code:
                finding.text = f"node {host}: {finding.text}"
                finding.fix = f"on {host}: install verl-krpo in the environment of its workers (pip install .)"
            findings.append(finding)
        for host, absent in absences:
            fix = "put it on a file system that every node mounts"
            findings += [_failure(f"node {host} does not see {path}", fix) for path in absent]
        return findings
    finally:
        ray.shutdown()


def on_every_node(function: Callable, *arguments: Any) -> list[tuple[str, Any]]:
    """(host, function(*arguments)) of a worker on every living node of the Ray that this process has joined.

    The function's module travels by value, so that a node without it can answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    module = sys.modules[function.__module__]
    ray.cloudpickle.register_pickle_by_value(module)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(function)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        placed = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        answers = ray.get(
            [task.options(scheduling_strategy=at).remote(*arguments) for at in placed], timeout=NODE_SECONDS
        )
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
    return [(node["NodeManagerAddress"], answer) for node, answer in zip(nodes, answers, strict=True)]


def _able(gpus: int) -> int:
    import ray

    return sum(node["Alive"] and node["Resources"].get("GPU", 0) >= gpus for node in ray.nodes())


def _named(address: str | None) -> str:
    address = address or os.environ.get("RAY_ADDRESS")
    return f"RAY_ADDRESS={address}" if address else "the one that last ran on this machine, or a new one"


def _failure(text: str, fix: str, detail: str = "") -> Finding:
    return Finding("plugin in a Ray worker", "failure", text, fix, detail, code=NOT_IN_WORKER)


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in look(*json.loads(sys.argv[1]))]))
