import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch

from verl_krpo.backends.gloo_checkpoint import GlooCheckpointEngine

WEIGHTS = {
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0),
}


def test_every_server_gets_every_tensor_and_idle_trainer_ranks_get_none():
    """Two trainer ranks, two servers: each in a thread of its own, over real sockets, twice."""
    engines = [GlooCheckpointEngine(bucket_size=0, is_master=rank == 0) for rank in range(4)]

    async def send(engine):
        await engine.send_weights(iter(WEIGHTS.items()))

    async def receive(engine):
        return {name: tensor.clone() async for name, tensor in engine.receive_weights()}

    def take_part(engine, arguments):
        engine.init_process_group(**arguments)
        done = asyncio.run(send(engine) if arguments["rank"] <= 0 else receive(engine))
        engine.finalize()
        return done

    for _ in range(2):
        metadata = [engine.prepare() for engine in engines]
        trainer, servers = GlooCheckpointEngine.build_topology(2, 2, metadata)
        arguments = [{key: kwargs[key][i] for key in kwargs} for kwargs in (trainer, servers) for i in range(2)]
        assert [each["rank"] for each in arguments] == [0, -1, 1, 2]
        with ThreadPoolExecutor(4) as pool:
            first, second, *received = pool.map(take_part, engines, arguments, timeout=600)
        assert first is None and second is None
        for got in received:
            assert list(got) == list(WEIGHTS)
            for name, tensor in WEIGHTS.items():
                assert got[name].dtype == tensor.dtype
                torch.testing.assert_close(got[name], tensor, atol=0, rtol=0)
