"""The memory of a verl run: which prompt a row answers, at which step, and what a checkpoint keeps of it.

verl gives every prompt a new uid each step, and an estimator nothing else that tells prompts apart. The rows of the
trainer know more: the dataset's `raw_prompt`, `data_source` and `extra_info`, from which `prompt_id` makes a name that
lasts. hooks.py calls this module before the trainers' advantages, and around their checkpoints.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from verl_krpo.advantage import settings_of
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import MemoryConfig
from verl_krpo.hook import marked

ESTIMATOR = "algorithm.adv_estimator=krpo_memory"
MEMORY_FILE = "krpo_memory.npz"
PROMPT_FIELDS = ("raw_prompt", "data_source", "extra_info")
WEIGHT = "krpo_weight"  # the field of rows whose prompts were chosen (next_batch.py)


@dataclass
class Run:
    """The run of this process: its trainer, its memory, and of the batch at hand by uid what the trainer's rows say.

    names: the prompt. weights: what its advantages are multiplied by, empty where nothing is. responses: how many it
    was given, empty where rollout.n were. fetched: step of the last fetch of prompts, and how many there were in it.
    """

    trainer: Any
    memory: PromptMemory
    names: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    responses: dict[str, int] = field(default_factory=dict)
    fetched: tuple[int, int] = (0, 0)

    @property
    def step(self) -> int:
        return int(self.trainer.global_steps)

    def prompts(self, uids: Iterable[str]) -> list[str]:
        """The lasting name behind every uid. RuntimeError for one that the trainer's rows did not name."""
        missing = [uid for uid in uids if uid not in self.names]
        if missing:
            raise RuntimeError(
                f"{ESTIMATOR} does not know which prompt the rows of uid {missing[0]} answer: it reads "
                "that from verl 0.9.1's V1 trainer and from its legacy one. Use one of these, or krpo_adaptive"
            )
        return [self.names[uid] for uid in uids]

    def weigh(self, advantages: torch.Tensor, uids: Sequence[str]) -> torch.Tensor:
        """Advantages (rows,) times the weights of their prompts."""
        if not self.weights:
            return advantages
        return advantages * advantages.new_tensor([self.weights[uid] for uid in uids])

    def count_fetch(self) -> int:
        """How many batches of prompts were fetched in this step before."""
        step, before = self.fetched
        before = before if step == self.step else 0
        self.fetched = (self.step, before + 1)
        return before


_run: Run | None = None


def run() -> Run:
    """The run of this process. RuntimeError where no trainer of verl's has begun one."""
    if _run is None:
        raise RuntimeError(
            f"{ESTIMATOR} needs the step and the checkpoints of verl's trainer, and none has started in "
            "this process. Use verl 0.9.1's V1 trainer or its legacy one, or krpo_adaptive"
        )
    return _run


def remembers(config: Any) -> bool:
    """Whether a verl config asks for a memory."""
    return config.algorithm.adv_estimator == "krpo_memory"


def settings(config: Any) -> MemoryConfig | None:
    """The keys of a verl config's memory, None where it asks for none."""
    return settings_of("krpo_memory", config.algorithm) if remembers(config) else None


def prompt_id(raw_prompt: Iterable[Mapping], data_source: Any, extra_info: Mapping | None) -> str:
    """A name of a prompt that lasts over epochs, shuffling and restarts: its data source and a hash of its text.

    Where text is not all (images, tools, an interaction), `extra_info.index` tells prompts of one text apart, and
    ValueError without one. Otherwise the index says nothing: datasets number each part from 0, and hold texts twice.
    """
    extra_info = extra_info or {}
    messages = [(message["role"], message["content"]) for message in raw_prompt]
    told = [str(data_source)]
    if any(extra_info.get(key) for key in ("tools_kwargs", "interaction_kwargs")) or not all(
        isinstance(content, str) for _, content in messages
    ):
        if extra_info.get("index") is None:
            raise ValueError(
                f"{ESTIMATOR}: a prompt of {data_source} is more than text and has no extra_info.index to "
                f"tell it from others: {str(messages)[:200]}. Number the data set's rows in extra_info.index, or "
                "use krpo_adaptive"
            )
        told.append(str(extra_info["index"]))
    text = json.dumps([*told, [(role, _text(content)) for role, content in messages]])
    return f"{data_source}:{blake2b(text.encode(), digest_size=16).hexdigest()}"


def _text(content: str | Iterable[Mapping]) -> list[str]:
    """What is text in a message's content."""
    return [content] if isinstance(content, str) else [str(part["text"]) for part in content if "text" in part]


def begin(trainer: Any) -> None:
    """After a trainer has loaded its checkpoint, or none: the memory that belongs to it.

    RuntimeError for a trainer that saves its checkpoints without us.
    """
    global _run
    if not remembers(trainer.config):
        return
    if not marked(type(trainer)._save_checkpoint):
        raise RuntimeError(
            f"{ESTIMATOR}: {type(trainer).__name__} has a way of its own to save checkpoints, which would "
            "be without the memory. Use verl 0.9.1's V1 trainer or its legacy one, or krpo_adaptive"
        )
    _run = Run(trainer, PromptMemory())
    if not _run.step:
        return
    resume = trainer.config.trainer
    folder = resume.resume_from_path if resume.resume_mode == "resume_path" else _folder(trainer)
    path = Path(folder) / MEMORY_FILE
    if path.exists():
        _run.memory = PromptMemory.load(path)
        print(f"krpo remembers {len(_run.memory)} prompts from {path}", flush=True)
    else:
        print(f"krpo's memory starts empty: the checkpoint has no {path}", flush=True)


def save(trainer: Any) -> None:
    """Before a trainer saves a checkpoint, so that one that counts as complete has its memory."""
    if remembers(trainer.config):
        _folder(trainer).mkdir(parents=True, exist_ok=True)
        run().memory.save(_folder(trainer) / MEMORY_FILE)


def _folder(trainer: Any) -> Path:
    return Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}"


def read_queue(trainer: Any, batch: Any) -> None:
    """What the rows of a batch of the V1 trainer say, which are in its TransferQueue."""
    keys = settings(trainer.config)
    if keys is None:
        return
    import transfer_queue as tq

    fields = ["uid", *PROMPT_FIELDS, *([WEIGHT] if keys.chooses else [])]
    rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    _name({key: list(rows[key]) for key in ("uid", *PROMPT_FIELDS)})
    if keys.chooses:
        run().weights = dict(zip(rows["uid"], (float(weight) for weight in rows[WEIGHT]), strict=True))


def read_batch(data: Any) -> None:
    """Name the prompts of a batch of the legacy trainer. (The V1 trainer's come here too, without PROMPT_FIELDS.)"""
    if _run is not None and all(key in data.non_tensor_batch for key in PROMPT_FIELDS):
        _name(data.non_tensor_batch)


def names(rows: Mapping[str, Iterable]) -> list[str]:
    """The lasting name of the prompt in every row."""
    return [prompt_id(*fields) for fields in zip(*(rows[key] for key in PROMPT_FIELDS), strict=True)]


def _name(rows: Mapping[str, Iterable]) -> None:
    names = {}
    for uid, *fields in zip(*(rows[key] for key in ("uid", *PROMPT_FIELDS)), strict=True):
        if uid not in names:
            names[uid] = prompt_id(*fields)
    run().names = names
