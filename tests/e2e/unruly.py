"""What agent loops do in the wild, and a reward that wants no learning: loaded by verl in test_features.py."""

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class Unruly(SingleTurnAgentLoop):
    """Four sessions a prompt: one output; three, each with the prompt of its own; two, of which the last is all the
    environment's (an empty mask); and a session that fails."""

    async def run(self, sampling_params, **kwargs):
        session = kwargs["session_id"]
        if session == 3:
            raise RuntimeError("the environment of this session is gone")
        first = await super().run(sampling_params, **kwargs)
        if session == 0:
            return first
        last = first.model_copy(deep=True)
        if session == 2:
            last.response_mask = [0] * len(last.response_mask)
            return [first, last]
        return [first, first.model_copy(deep=True), last]


class EndsEmpty(SingleTurnAgentLoop):
    """A session in four ends in an output without a token."""

    async def run(self, sampling_params, **kwargs):
        first = await super().run(sampling_params, **kwargs)
        if kwargs["session_id"]:
            return first
        last = first.model_copy(deep=True)
        last.response_ids, last.response_mask, last.response_logprobs = [], [], [] if last.response_logprobs else None
        return [first, last]


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **kwargs) -> float:
    """1 or 0 as by the toss of a coin, another one for every prompt."""
    return float(sum(map(ord, solution_str + ground_truth)) % 2)


def by_prompt(data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **kwargs) -> float:
    """Two prompts in three teach nothing: one of them earns 1 and the other 0, whatever is answered."""
    kind = int(ground_truth) % 3
    return kind / 2 if kind != 1 else compute_score(data_source, solution_str, ground_truth, extra_info)
