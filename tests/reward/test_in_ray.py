"""The mathematics reward where verl calls it: in threads of a Ray actor."""

import ray


class Rewards:
    """As verl's reward worker: the function by its path, called from a thread."""

    def __init__(self):
        from verl.utils.import_utils import load_extern_object

        self.compute_score = load_extern_object("pkg://verl_krpo.reward.math", "compute_score")

    def score(self, answer: str, truth: str) -> dict:
        return self.compute_score(data_source="a", solution_str=f"\\boxed{{{answer}}}", ground_truth=truth)

    def kill_a_worker(self) -> int:
        import psutil

        workers = [w for w in psutil.Process().children() if "reward.algebra" in " ".join(w.cmdline())]
        workers[0].kill()
        return len(workers)


def test_in_an_actor_of_ray_with_threads_and_a_killed_worker():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        rewards = ray.remote(Rewards).options(max_concurrency=8).remote()
        rows = [(f"\\frac{{{2 * n}\\pi}}{{{n}}}", "2\\pi") for n in range(1, 17)]
        asked = [rewards.score.remote(*row) for row in rows]
        killed = rewards.kill_a_worker.remote()
        asked += [rewards.score.remote(*row) for row in rows]
        assert ray.get(killed, timeout=300) >= 1
        assert [row["score"] for row in ray.get(asked, timeout=300)] == [1.0] * 32
    finally:
        ray.shutdown()
