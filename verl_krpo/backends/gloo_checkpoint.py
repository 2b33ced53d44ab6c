"""Weights from trainer ranks to standalone servers over gloo: `rollout.checkpoint_engine.backend=gloo`.

verl's separate_async trainer moves weights by a checkpoint engine; its own need GPUs or RDMA. Here the first trainer
rank and every server rank form a gloo group for the length of one update, and each tensor is broadcast in it.
"""

import pickle
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

TIMEOUT = timedelta(seconds=120)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Ranks of the group: 0 is the first trainer rank, 1.. the servers; other trainer ranks stay outside."""

    def __init__(self, bucket_size: int, is_master: bool = False):
        self.is_master = is_master
        self.store: TCPStore | None = None
        self.group: ProcessGroupGloo | None = None

    def prepare(self) -> tuple[str, int] | None:
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return host, self.store.port

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list) -> tuple[dict, dict]:
        size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks, "size": [size] * len(ranks), "address": [metadata[0]] * len(ranks)}

        return arguments([0] + [-1] * (actor_wg_world_size - 1)), arguments(list(range(1, size)))

    def init_process_group(self, rank: int, size: int, address: tuple[str, int]) -> None:
        if rank < 0:
            return
        if rank > 0:
            self.store = TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self.group = ProcessGroupGloo(self.store, rank, size, TIMEOUT)

    def finalize(self) -> None:
        self.group = self.store = None

    async def send_weights(self, weights, global_steps: int | None = None) -> None:
        """Every trainer rank iterates, for FSDP gathers each tensor from all of them; the first one sends."""
        async for name, tensor in ensure_async_iterator(weights):
            if self.group is not None:
                tensor = tensor.detach().cpu().contiguous()
                self._send(pickle.dumps((name, tensor.shape, tensor.dtype)))
                self._broadcast(tensor.view(-1).view(torch.uint8))
        if self.group is not None:
            self._send(b"")

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        while header := self._receive():
            name, shape, dtype = pickle.loads(header)
            data = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
            self._broadcast(data)
            yield name, data.view(dtype).view(shape)

    def _broadcast(self, data: torch.Tensor) -> None:
        self.group.broadcast(data, 0).wait()

    def _send(self, message: bytes) -> None:
        self._broadcast(torch.tensor([len(message)]))
        if message:
            self._broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))

    def _receive(self) -> bytes:
        length = torch.zeros(1, dtype=torch.long)
        self._broadcast(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        if len(data):
            self._broadcast(data)
        return data.numpy().tobytes()
