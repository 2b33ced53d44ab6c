"""Real verl jobs on CPUs, as a user starts them: a subprocess, bounded in time, read back from verl's file logger."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Job:
    """A finished job: metrics by step (0 is the validation before training), its output, and its exit code."""

    metrics: dict[int, dict[str, float]]
    output: str
    code: int
    seconds: float

    def steps(self) -> list[dict[str, float]]:
        """The metrics of the training steps, in order."""
        return [self.metrics[step] for step in sorted(self.metrics) if step > 0]


class RunningJob:
    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        self.folder, self.began = folder, time.monotonic()
        self.metrics_file, self.output_file = folder / "metrics.jsonl", folder / "output.txt"
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        ours = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "VERL_FILE_LOGGER_PATH": str(self.metrics_file)}
        with open(self.output_file, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, **ours, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def metrics(self) -> dict[int, dict[str, float]]:
        """What has been logged so far."""
        if not self.metrics_file.exists():
            return {}
        lines = [json.loads(line) for line in self.metrics_file.read_text().splitlines() if line.endswith("}")]
        return {line["step"]: line["data"] for line in lines}

    def wait_for_step(self, step: int, seconds: float) -> None:
        """Until verl has logged this step; a failure of the test when the job ends or takes longer."""
        deadline = time.monotonic() + seconds
        while step not in self.metrics():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output_file.read_text()[-6000:]
            time.sleep(0.2)

    def wait(self, seconds: float) -> Job:
        """The finished job; a failure of the test when it takes longer."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job took more than {seconds} s; its output ends\n{self.output_file.read_text()[-4000:]}")
        return Job(self.metrics(), self.output_file.read_text(), code, time.monotonic() - self.began)

    def stop(self) -> None:
        """End the driver, if it still runs; the Ray it started ends with it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture(scope="session")
def job_inputs(tmp_path_factory) -> list[str]:
    """Overrides for a tiny model that has seen a little of its task, sums as data, and their reward."""
    from verl_krpo import tiny_model
    from verl_krpo.data import arithmetic

    folder = tmp_path_factory.mktemp("inputs")
    tiny_model.build(folder / "model", steps=30)
    arithmetic.prepare(folder / "sums", level="sums", train_rows=256, test_rows=32, seed=0)
    return [
        f"data.train_files={folder}/sums/train.parquet",
        f"data.val_files={folder}/sums/test.parquet",
        f"actor_rollout_ref.model.path={folder}/model",
        "reward.custom_reward_function.path=pkg://verl_krpo.reward.answer_tag",
    ]


@pytest.fixture
def start_command(tmp_path):
    """start_command(command, **environment) -> a RunningJob of it, in a folder of its own."""
    started = []

    def start(command: list[str], **environment: str) -> RunningJob:
        folder = tmp_path / f"job{len(started)}"
        folder.mkdir()
        started.append(RunningJob(command, folder, environment))
        return started[-1]

    yield start
    for job in started:
        job.stop()


@pytest.fixture
def start_job(job_inputs, start_command):
    """start_job(*overrides, **environment) -> a RunningJob of verl's own command line."""

    def start(*overrides: str, **environment: str) -> RunningJob:
        return start_command([sys.executable, "-m", "verl.trainer.main_ppo", *job_inputs, *overrides], **environment)

    return start


@pytest.fixture
def verl_job(start_job):
    """verl_job(*overrides, seconds=600, **environment) -> the finished Job, which must have succeeded."""

    def run(*overrides: str, seconds: float = 600, **environment: str) -> Job:
        job = start_job(*overrides, **environment).wait(seconds)
        assert job.code == 0, job.output[-6000:]
        return job

    return run
