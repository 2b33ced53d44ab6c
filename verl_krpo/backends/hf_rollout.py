"""`actor_rollout_ref.rollout.name=hf`: a verl rollout server on transformers, for CPUs and for any GPU.

One Ray actor a replica holds a copy of the model, collects requests until none came for 20 ms, and generates for all of
them in one batch. It speaks the part of vLLM's server verl's trainers use: generate, weight updates, abort and resume.
Tokens go in and out; there is no HTTP endpoint and no tensor parallelism.
"""

import asyncio
import os
from collections import Counter
from hashlib import blake2b
from typing import Any

import ray
import torch
from omegaconf import DictConfig
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.model import get_hf_auto_model_class
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_krpo.backends import sampling
from verl_krpo.backends.generation import Request, generate

COLLECT_SECONDS = 0.02


def check(rollout: RolloutConfig | DictConfig) -> None:
    """ValueError for rollout settings this server does not honour."""
    for size in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if getattr(rollout, size) != 1:
            raise ValueError(
                f"actor_rollout_ref.rollout.{size}={getattr(rollout, size)}: rollout.name=hf runs one process a "
                f"replica, set actor_rollout_ref.rollout.{size}=1"
            )
    if rollout.logprobs_mode != "processed_logprobs":
        raise ValueError(
            f"actor_rollout_ref.rollout.logprobs_mode={rollout.logprobs_mode}: rollout.name=hf reports the "
            "log-probabilities of the sampled distribution, set actor_rollout_ref.rollout.logprobs_mode="
            "processed_logprobs"
        )


class HfServer:
    """One copy of the model behind a queue of requests. Runs as a Ray actor; every method is short or awaits."""

    def __init__(self, config: RolloutConfig, model_config: DictConfig, replica_rank: int):
        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        model_config: HFModelConfig = omega_conf_to_dataclass(model_config)
        self.device = torch.device(get_platform().device_name)
        self.model = _build_model(self.config, model_config).to(self.device).eval()
        self.eos = _end_tokens(model_config)
        self.pad = model_config.tokenizer.pad_token_id or 0
        self.max_model_len = self.config.max_model_len or self.config.prompt_length + self.config.response_length
        self.generator = torch.Generator(self.device).manual_seed(self.config.seed + replica_rank)
        self.global_steps = None
        self._asked: Counter[tuple[int, ...]] = Counter()  # requests for each prompt since the last weights

        self._waiting: asyncio.Queue[tuple[Request, asyncio.Future]] = asyncio.Queue()
        self._in_flight: set[Request] = set()
        self._model_lock = asyncio.Lock()  # generation and weight updates take turns
        self._open = asyncio.Event()  # closed between abort_all_requests and resume_generation
        self._open.set()
        self._reject = False
        self._has_weights = asyncio.Event()  # not before the first whole update, where none are loaded from disk
        if self.config.load_format != "dummy":
            self._has_weights.set()
        self._updated: set[int] = set()
        self._serving: asyncio.Task | None = None

    async def ready(self) -> None:
        """Answers once the model is built."""

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list | None = None,
        video_data: list | None = None,
        audio_data: list | None = None,
        mm_processor_kwargs: dict | None = None,
    ) -> TokenOutput:
        """Response tokens with the log-probabilities of the sampled distribution; waits while generation is paused.

        Aborted requests return what they have so far, stop_reason "aborted". ValueError for images, video or audio,
        for a prompt that leaves no room, and for sampling parameters this server does not know.
        """
        if image_data or video_data or audio_data:
            raise ValueError("rollout.name=hf generates from text only: use vllm or sglang for images, video or audio")
        prompt = normalize_token_ids(prompt_ids)
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in {self.max_model_len}: "
                "raise data.max_prompt_length or actor_rollout_ref.rollout.max_model_len"
            )
        limit = min(self.config.response_length, self.config.prompt_length + self.config.response_length - len(prompt))
        params = sampling.read_params({"ignore_eos": self.config.ignore_eos, **sampling_params}, max_tokens=limit)
        if self.config.full_determinism and params.seed is None:
            params = params._replace(seed=self._next_seed(prompt))
        request = Request(prompt, params._replace(max_tokens=min(params.max_tokens, room)))

        while not (self._open.is_set() and self._has_weights.is_set()):
            if self._reject:
                return self._output(request, "aborted")
            await self._has_weights.wait()
            await self._open.wait()
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        done = asyncio.get_running_loop().create_future()
        self._in_flight.add(request)
        self._waiting.put_nowait((request, done))
        await done
        return self._output(request, request.stop_reason)

    def _next_seed(self, prompt: list[int]) -> int:
        """Of (rollout.seed, step, prompt, how often it was asked): of one server the same answers in whatever order
        requests arrive. verl's own request ids do not tell sessions apart."""
        asked = self._asked[tuple(prompt)]
        self._asked[tuple(prompt)] += 1
        words = f"{self.config.seed} {self.global_steps} {prompt} {asked}"
        return int.from_bytes(blake2b(words.encode(), digest_size=7).digest(), "big")

    def _output(self, request: Request, stop_reason: str) -> TokenOutput:
        return TokenOutput(
            token_ids=request.tokens,
            log_probs=request.log_probs,
            stop_reason=stop_reason,
            extra_fields={"global_steps": self.global_steps},
        )

    async def _serve(self) -> None:
        """Batch after batch, for as long as the server lives."""
        while True:
            batch = [await self._waiting.get()]
            await self._has_weights.wait()  # an update may have begun since they were let in
            while len(batch) < self.config.max_num_seqs:
                try:
                    batch.append(await asyncio.wait_for(self._waiting.get(), COLLECT_SECONDS))
                except asyncio.TimeoutError:
                    break
            requests = [request for request, _ in batch]
            try:
                async with self._model_lock:
                    await asyncio.to_thread(generate, self.model, requests, self.eos, self.pad, self.generator)
                error = None
            except Exception as raised:  # the callers get it; the server goes on
                error = raised
            self._in_flight.difference_update(requests)
            for _, done in batch:
                if done.cancelled():
                    continue
                if error is not None:
                    done.set_exception(error)
                else:
                    done.set_result(None)

    async def update_weights(self, tensors: list[tuple[str, torch.Tensor]], last: bool, global_steps: int | None):
        """Copy named tensors into the model; `last` closes an update, which must then have reached every parameter."""
        async with self._model_lock:
            self._has_weights.clear()
            own = self.model.state_dict()
            for name, tensor in tensors:
                if name not in own:
                    raise ValueError(f"weight update names {name}, which {type(self.model).__name__} does not have")
                own[name].copy_(tensor)
                self._updated.add(own[name].data_ptr())
            if not last:
                return
            missing = [name for name, tensor in own.items() if tensor.data_ptr() not in self._updated]
            if missing:
                raise ValueError(f"weight update left out {len(missing)} of {len(own)} tensors: {missing[:5]}")
            self._updated.clear()
            self._asked.clear()
            self.global_steps = global_steps
            self._has_weights.set()

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Stop at the next token; until resume_generation, hold new requests or (`reject_request`) send them back."""
        self._open.clear()
        self._reject = reject_request
        aborted = len(self._in_flight)
        while self._in_flight:
            for request in self._in_flight:
                request.abort = True
            await asyncio.sleep(0.005)
        return {"aborted_count": aborted}

    async def resume_generation(self) -> None:
        self._reject = False
        self._open.set()


def _build_model(config: RolloutConfig, model_config: HFModelConfig) -> torch.nn.Module:
    """The model in rollout.dtype; with load_format=dummy its weights arrive by update_weights."""
    auto_class = get_hf_auto_model_class(hf_config=model_config.hf_config)
    dtype = PrecisionType.to_dtype(config.dtype)
    if config.load_format == "dummy":
        model = auto_class.from_config(model_config.hf_config, trust_remote_code=model_config.trust_remote_code)
    else:
        model = auto_class.from_pretrained(
            model_config.local_path, config=model_config.hf_config, trust_remote_code=model_config.trust_remote_code
        )
    return model.to(dtype)


def _end_tokens(model_config: HFModelConfig) -> set[int]:
    """The tokens that end a response: the tokenizer's and the generation config's."""
    ends = {model_config.tokenizer.eos_token_id}
    configured = getattr(model_config.generation_config, "eos_token_id", None)
    ends.update(configured if isinstance(configured, list) else [configured])
    return {token for token in ends if token is not None}


class HfReplica(RolloutReplica):
    """Launches one HfServer beside its trainer rank. Weights and cache stay in memory: sleeping frees nothing."""

    async def launch_servers(self) -> None:
        check(self.config)
        if self.is_reward_model or self.is_teacher_model:
            raise ValueError("rollout.name=hf serves rollouts only: use vllm or sglang for reward models and teachers")
        platform = get_platform()
        resource_name = platform.ray_resource_name()
        node, devices = await self.workers[0].__ray_call__.remote(
            lambda worker: (
                ray.get_runtime_context().get_node_id(),
                ray.get_runtime_context().get_accelerator_ids()[resource_name],
            )
        )
        environment = {name: "1" for name in platform.ray_noset_envvars()}
        if platform.device_name != "cpu":  # the trainer rank's own, and known before the process starts
            environment[platform.visible_devices_envvar()] = ",".join(devices)
        server = (
            ray.remote(HfServer)
            .options(
                name=server_name(self.replica_rank),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                runtime_env={"env_vars": environment},
                max_concurrency=self.max_concurrency,
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = server_name(self.replica_rank)  # a name, not a URL: there is no HTTP endpoint

    async def sleep(self) -> None:
        pass

    wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = sleep

    async def start_profile(self, **kwargs) -> None:
        pass

    stop_profile = start_profile


def server_name(replica_rank: int) -> str:
    return f"hf_server_{replica_rank}"


class HfServerAdapter(BaseRollout):
    """The trainer rank's end: sends its weights to its replica's server."""

    def __init__(self, config: RolloutConfig, model_config: HFModelConfig, device_mesh, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.is_leader_rank = True
        self._server: ActorHandle | None = None

    @torch.no_grad()
    async def update_weights(
        self, weights, global_steps: int | None = None, wire_format: str = "named_tensors", peft_config=None, **kwargs
    ) -> None:
        """Send named tensors in buckets of checkpoint_engine.update_weights_bucket_megabytes."""
        if wire_format != "named_tensors":
            raise ValueError(f"rollout.name=hf takes whole tensors, not {wire_format}")
        if peft_config is not None:
            raise ValueError("rollout.name=hf takes merged weights: set actor_rollout_ref.model.lora.merge=True")
        if self._server is None:
            self._server = ray.get_actor(server_name(self.replica_rank))  # launched after this adapter
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        bucket, size = [], 0
        async for name, tensor in ensure_async_iterator(weights):
            if bucket and size + tensor.nbytes > limit:
                await self._server.update_weights.remote(bucket, last=False, global_steps=global_steps)
                bucket, size = [], 0
            bucket.append((name, tensor.detach().cpu()))
            size += tensor.nbytes
        await self._server.update_weights.remote(bucket, last=True, global_steps=global_steps)

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass
