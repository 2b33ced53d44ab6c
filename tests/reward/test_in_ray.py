"""The mathematics reward where verl calls it: in threads of a Ray actor."""

from contextlib import suppress

import ray


def rewards():
    """A class of actors as verl's reward workers: the function by its path, called from threads."""

    class Rewards:  # in here, so that Ray sends it whole: its processes cannot import this file
        def __init__(self):
            from verl.utils.import_utils import load_extern_object

            self.compute_score = load_extern_object("pkg://verl_krpo.reward.math", "compute_score")

        def score(self, answer, truth):
            return self.compute_score(data_source="a", solution_str=f"\\boxed{{{answer}}}", ground_truth=truth)

        def kill_a_worker(self):
            import psutil

            killed = 0
            for worker in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):  # it ended by itself since, or is a zombie
                    if not killed and "reward.algebra" in " ".join(worker.cmdline()):
                        worker.kill()
                        killed += 1
            return killed

    return Rewards


def test_in_an_actor_of_ray_with_threads_and_a_killed_worker():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        actor = ray.remote(rewards()).options(max_concurrency=8).remote()
        rows = [(f"\\frac{{{2 * n}\\pi}}{{{n}}}", "2\\pi") for n in range(1, 17)]
        asked = [actor.score.remote(*row) for row in rows]
        killed = actor.kill_a_worker.remote()
        asked += [actor.score.remote(*row) for row in rows]
        assert ray.get(killed, timeout=600) >= 1
        assert [row["score"] for row in ray.get(asked, timeout=600)] == [1.0] * 32
    finally:
        ray.shutdown()
