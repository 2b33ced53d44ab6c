import asyncio

import pytest
import torch
import yaml
from verl.plugin.platform import platform_manager
from verl.workers.config import HFModelConfig, RolloutConfig

from verl_krpo import tiny_model
from verl_krpo.backends.cpu_platform import CpuPlatform
from verl_krpo.backends.hf_rollout import HfServer, check

PROMPT = [70, 71, 72, 73]
FULL = dict(temperature=1.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, logprobs=True)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A random tiny model with its tokenizer on disk."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_model.tokenizer()
    model = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def serve(saved, monkeypatch):
    """serve(scenario, **rollout settings): runs the coroutine scenario(server) and returns what it returns."""
    monkeypatch.setattr(platform_manager, "_current_platform", CpuPlatform())

    def run(scenario, **settings):
        async def main():
            config = dict(name="hf", dtype="float32", load_format="auto", prompt_length=32, response_length=32)
            model = HFModelConfig(path=str(saved), override_config={"attn_implementation": "sdpa"})
            return await scenario(HfServer(RolloutConfig(**{**config, **settings}), model, 0))

        return asyncio.run(asyncio.wait_for(main(), 60))

    return run


def generate(server, sampling=FULL, prompt=PROMPT):
    return server.generate(prompt_ids=list(prompt), sampling_params=dict(sampling), request_id="r")


def test_concurrent_requests_get_exact_log_probs(serve):
    async def scenario(server):
        outputs = await asyncio.gather(*[generate(server, prompt=PROMPT[: 1 + i % 4]) for i in range(9)])
        return server.model, outputs

    model, outputs = serve(scenario)
    for i, output in enumerate(outputs):
        prompt = PROMPT[: 1 + i % 4]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.log_probs), expected, atol=1e-5, rtol=0)
        assert output.stop_reason == "completed"


def test_weights_arrive_by_name_and_change_the_output(serve):
    greedy = {**FULL, "temperature": 0, "ignore_eos": True}

    async def scenario(server):
        before = await generate(server, greedy)
        own = dict(server.model.named_parameters())  # the tied head only once
        changed = {name: tensor.detach() + 0.1 * torch.randn_like(tensor) for name, tensor in own.items()}
        items = list(changed.items())
        await server.update_weights(items[:5], last=False, global_steps=7)
        parked = asyncio.create_task(generate(server, greedy))
        await asyncio.sleep(0.1)
        assert not parked.done()  # half an update is no model
        await server.update_weights(items[5:], last=True, global_steps=7)
        after = await parked
        for name, tensor in server.model.named_parameters():
            torch.testing.assert_close(tensor, changed[name], atol=0, rtol=0)
        return before, after

    torch.manual_seed(0)
    before, after = serve(scenario)
    assert before.token_ids != after.token_ids
    assert (before.extra_fields["global_steps"], after.extra_fields["global_steps"]) == (None, 7)


def test_a_server_without_weights_waits_for_them(serve, saved):
    async def scenario(server):
        task = asyncio.create_task(generate(server))
        await asyncio.sleep(0.2)
        assert not task.done()
        assert await server.abort_all_requests() == {"aborted_count": 0}  # none was let in
        await server.resume_generation()
        await server.update_weights(list(server.model.state_dict().items()), last=True, global_steps=0)
        return await task

    assert serve(scenario, load_format="dummy").token_ids


@pytest.mark.parametrize("fault, message", [("missing", "left out 1 of"), ("unknown", "names model.nothing")])
def test_an_update_that_does_not_fit_is_refused(serve, fault, message):
    async def scenario(server):
        weights = dict(server.model.state_dict())
        if fault == "missing":
            del weights["model.norm.weight"]
        else:
            weights["model.nothing"] = torch.zeros(1)
        await server.update_weights(list(weights.items()), last=True, global_steps=0)

    with pytest.raises(ValueError, match=message):
        serve(scenario)


def test_abort_returns_the_part_and_resume_goes_on(serve):
    endless = {**FULL, "ignore_eos": True}

    async def scenario(server):
        task = asyncio.create_task(generate(server, endless))
        while not any(request.tokens for request in server._in_flight):
            await asyncio.sleep(0.001)
        assert await server.abort_all_requests() == {"aborted_count": 1}
        part = await task
        rest = asyncio.create_task(generate(server, {**endless, "max_tokens": 5}, prompt=PROMPT + part.token_ids))
        await asyncio.sleep(0.1)
        assert not rest.done()  # held while generation is paused
        await server.resume_generation()
        return part, await rest

    part, rest = serve(scenario, response_length=2000)
    assert part.stop_reason == "aborted" and 0 < len(part.token_ids) == len(part.log_probs) < 2000
    assert rest.stop_reason == "completed" and len(rest.token_ids) == 5


def test_full_determinism_gives_the_same_answers_in_whatever_order_prompts_arrive(serve):
    prompts = [PROMPT, PROMPT[:2], PROMPT, PROMPT[:3], PROMPT]

    def answers(order, **settings):
        async def scenario(server):
            found = []
            for part in order:  # batches of different sizes
                outputs = await asyncio.gather(*[generate(server, prompt=prompts[i]) for i in part])
                found += [(prompts[i], output.token_ids) for i, output in zip(part, outputs, strict=True)]
            return sorted(found)

        return serve(scenario, full_determinism=True, **settings)

    first = answers([[0, 1, 2, 3, 4]])
    assert first == answers([[4, 3], [2], [1, 0]])
    assert first != answers([[0, 1, 2, 3, 4]], seed=7)
    three = [tokens for prompt, tokens in first if prompt == PROMPT]
    assert len({tuple(tokens) for tokens in three}) == 3  # samples, not copies


def test_full_determinism_draws_anew_with_every_weights(serve):
    async def scenario(server):
        outputs = []
        for step in (1, 2, 1):
            await server.update_weights(list(server.model.state_dict().items()), last=True, global_steps=step)
            outputs.append((await generate(server)).token_ids)
        return outputs

    first, second, again = serve(scenario, full_determinism=True)
    assert first == again != second


def test_a_server_that_leaves_rejects_new_requests(serve):
    async def scenario(server):
        await server.abort_all_requests(reject_request=True)
        return await generate(server)

    output = serve(scenario)
    assert (output.token_ids, output.stop_reason) == ([], "aborted")


def test_a_failing_batch_fails_its_requests_and_not_the_server(serve):
    async def scenario(server):
        with pytest.raises(IndexError):
            await generate(server, prompt=[10**6])  # no such token
        return await generate(server)

    assert serve(scenario).token_ids


def test_a_caller_that_goes_away_harms_nobody(serve):
    async def scenario(server):
        gone, stays = (asyncio.create_task(generate(server)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays, await generate(server)

    assert all(output.token_ids for output in serve(scenario))


def test_requests_that_cannot_be_served_say_why(serve):
    async def scenario(server):
        with pytest.raises(ValueError, match="leaves no room in 64"):
            await generate(server, prompt=[70] * 64)
        with pytest.raises(ValueError, match="text only"):
            await server.generate(prompt_ids=PROMPT, sampling_params=dict(FULL), request_id="r", image_data=[object()])

    serve(scenario)


@pytest.mark.parametrize(
    "setting",
    ["tensor_model_parallel_size=2", "data_parallel_size=2", "logprobs_mode=raw_logprobs"],
)
def test_settings_that_are_not_honoured_are_refused(compose, setting):
    rollout = compose("actor_rollout_ref.rollout.tensor_model_parallel_size=1").actor_rollout_ref.rollout
    check(rollout)
    key, _, value = setting.partition("=")
    rollout[key] = yaml.safe_load(value)
    with pytest.raises(ValueError, match=rf"rollout.{setting}: .*set actor_rollout_ref.rollout.{key}="):
        check(rollout)
