"""scripts/slurm/train.slurm with stand-ins for SLURM's commands and for Ray: what starts where, and that it ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]

STAND_INS = {
    "scontrol": "echo node1; echo node2; echo node3",
    "hostname": "echo 127.0.0.1",
    "srun": """
        for option in "$@"; do [[ $option != --nodelist=* ]] || export NODE=${option#--nodelist=}; done
        while [[ $1 == --* ]]; do shift; done
        echo "$NODE: $*" >> "$CALLS"
        exec "$@" """,
    # The environment's python: a Ray head listens, a Ray worker waits, anything else is only written down.
    "python": f"""
        case "$*" in
            *"start --head"*) exec {sys.executable} -c 'import os, socket, time
server = socket.create_server(("127.0.0.1", int(os.environ["PORT"]))); time.sleep(600)' ;;
            *"start --block --address"*) exec sleep 600 ;;
            "-m verl_krpo"*) echo "RAY_ADDRESS=$RAY_ADDRESS $*" >> "$CALLS" ;;
        esac""",
}


def test_the_slurm_script_starts_ray_on_every_node_and_the_recipe_on_the_first(tmp_path):
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    calls = tmp_path / "calls"
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_GPUS_ON_NODE": "4"}
    ours = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
    ours |= {"PORT": str(port), "RUN_DIR": str(tmp_path / "run"), "WAIT_SECONDS": "30"}
    before = set(psutil.Process().children(recursive=True))
    done = subprocess.run(
        ["bash", ROOT / "scripts/slurm/train.slurm", "recipes/run_krpo_qwen.sh", "trainer.total_epochs=2"],
        env=os.environ | slurm | ours,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = calls.read_text().splitlines()
    ray = sorted(line for line in lines if "scripts/ray_" in line)
    assert ray[0].startswith("node1: env NODE_IP=127.0.0.1 bash scripts/ray_head.sh")
    assert [line.split(" --num-cpus")[0] for line in ray[1:]] == [
        f"{node}: bash scripts/ray_worker.sh 127.0.0.1:{port}" for node in ("node2", "node3")
    ]
    assert "node1: bash recipes/run_krpo_qwen.sh trainer.total_epochs=2" in lines
    (trained,) = [line for line in lines if "verl.trainer.main_ppo" in line]
    assert trained.startswith(f"RAY_ADDRESS=127.0.0.1:{port} ")
    assert "trainer.nnodes=3 trainer.n_gpus_per_node=4" in trained and trained.endswith("trainer.total_epochs=2")
    assert set(psutil.Process().children(recursive=True)) <= before
    with socket.socket() as port_again:  # the head is gone with the job
        assert port_again.connect_ex(("127.0.0.1", port)) != 0


def test_a_worker_without_a_head_gives_up_in_time(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        ["bash", ROOT / "scripts/ray_worker.sh", f"127.0.0.1:{port}"],
        env=os.environ | {"PYTHON": sys.executable, "NODE_IP": "127.0.0.1", "WAIT_SECONDS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert f"no Ray head at 127.0.0.1:{port} after 1 s" in done.stderr and "ray_head.sh" in done.stderr
