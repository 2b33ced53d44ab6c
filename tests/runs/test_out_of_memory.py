import pytest

from verl_krpo.runs import progress

RAY_2_60 = """
(raylet) Memory on the node (IP: 10.0.0.1, ID: ab12) was 14.90GB used / 15.70GB limit (0.949045)
OOM kill reason: Memory usage 15998000000B exceeded threshold of 15900000000B (95.0% of 15.70GB limit)
Object store memory usage: [- objects spillable: 0]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
4711\t12.31\tray::WorkerDict.actor_rollout_update
4712\t0.60\tray::TaskRunner
"""
RAY_2_40 = """
Memory on the node (IP: 10.0.0.1, ID: ab12) where the task (actor ID: cd) was running was 14.90GB / 15.70GB (0.949)
The top 10 memory users are:
PID MEM(GB) COMMAND
4711 12.31  ray::WorkerDict.actor_rollout_update
"""


@pytest.mark.parametrize("log", [RAY_2_60, RAY_2_40])
def test_rays_report_of_a_full_memory_becomes_a_sentence(log):
    sentence = progress.out_of_memory(log)
    assert sentence.startswith(
        "Ray ended the job for memory: 14.90 of 15.70 GB were in use, 12.31 GB of them by ray::Worker"
    )
    assert "ppo_max_token_len_per_gpu" in sentence
    assert progress.out_of_memory("memory: about 5.0 GiB\nValueError: no\n") is None
