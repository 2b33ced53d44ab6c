"""Is the model there, can it be talked to, and does it reach as far as prompt and response together?"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_krpo.doctor.finding import Finding, missing

HUB_SECONDS = 10
FILES = {
    "config.json": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    "weights": ("*.safetensors", "*.bin"),
}
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
MAX_MODEL_LEN = "actor_rollout_ref.rollout.max_model_len"


def present(config: DictConfig) -> list[Finding]:
    """A folder that transformers can load, or a model of the Hugging Face hub that is here or can be fetched."""
    path = config.actor_rollout_ref.model.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        absent = [name for name, globs in FILES.items() if not any(any(folder.glob(g)) for g in globs)]
        fix = "MODEL_PATH=FOLDER with a model as transformers saves it, or the hub's name of one"
        return [missing(f"the model folder {path} has no {', no '.join(absent)}", fix)] if absent else []
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        return [missing(f"there is no model folder {path}", "MODEL_PATH=FOLDER, or the hub's name OWNER/MODEL")]
    return _on_hub(path)


def _on_hub(name: str) -> list[Finding]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if folder_of(name):
        return []
    elsewhere = f"where there is a network: hf download {name} --local-dir FOLDER; then MODEL_PATH=FOLDER"
    if constants.HF_HUB_OFFLINE:
        return [missing(f"the model {name} is not in the cache, and HF_HUB_OFFLINE is set", elsewhere)]
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        fix = f"accept its license at https://huggingface.co/{name}, then: hf auth login"
        return [missing(f"the model {name} is given to those who accept its license", fix)]
    except RepositoryNotFoundError:
        return [missing(f"the hub has no model {name}, or does not show it to you", "MODEL_PATH, or: hf auth login")]
    except Exception as error:  # no network has many names: connection, proxy, certificate, timeout
        return [
            missing(f"the model {name} is not here and the hub does not answer ({type(error).__name__})", elsewhere)
        ]
    return []


def folder_of(path: str) -> Path | None:
    """The folder of a model that is here: the path itself, or its snapshot in the hub's cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    return Path(cached).parent if isinstance(cached, str) else None


def chat_template(config: DictConfig) -> list[Finding]:
    """The tokenizer has a chat template: verl makes every prompt with it."""
    model = config.actor_rollout_ref.model
    path = model.get("tokenizer_path") or model.path
    folder = folder_of(path)
    if folder is None or model.get("custom_chat_template"):
        return []
    if _json(folder / "tokenizer_config.json").get("chat_template") or any((folder / t).exists() for t in TEMPLATES):
        return []
    fix = "take an instruct model, whose tokenizer has one, or set actor_rollout_ref.model.custom_chat_template"
    return [missing(f"the tokenizer of {path} has no chat template: verl could not make a prompt", fix)]


def lengths(config: DictConfig) -> list[Finding]:
    """Prompt and response fit into the model's positions, and into rollout.max_model_len."""
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    limit, needed = config.actor_rollout_ref.rollout.get("max_model_len"), prompt + response
    folder = folder_of(config.actor_rollout_ref.model.path)
    model = _json(folder / "config.json") if folder else {}
    model = model.get("text_config") or model
    positions = model.get("max_position_embeddings")
    together = f"data.max_prompt_length + data.max_response_length are {prompt} + {response} = {needed}"
    if positions and needed > positions:
        text = f"the model reaches {positions} tokens, {together}: longer answers are cut without a word"
        return [
            missing(text, f"data.max_response_length={max(1, positions - prompt)}, or a model with a longer context")
        ]
    if limit and positions and limit > positions:
        return [missing(f"{MAX_MODEL_LEN}={limit}, the model reaches {positions} tokens", f"{MAX_MODEL_LEN}={needed}")]
    if limit and limit < needed:
        text = f"{MAX_MODEL_LEN}={limit}, {together}: longer answers are cut without a word"
        return [missing(text, f"{MAX_MODEL_LEN}={needed}")]
    engine = OmegaConf.select(config, "actor_rollout_ref.rollout.name")  # None where the job has not said it yet
    if engine == "vllm" and not limit and positions and positions > needed:
        text = (
            f"{MAX_MODEL_LEN} is not set: vLLM makes room for {positions} tokens{_room(model, positions)}, {together}"
        )
        return [Finding("job", "warning", text, f"{MAX_MODEL_LEN}={needed}")]
    return []


def _room(model: dict[str, Any], tokens: int) -> str:
    """What the keys and values of as many tokens take in 16 bits, where the config says so."""
    try:
        heads = model.get("num_key_value_heads") or model["num_attention_heads"]
        width = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
        return f" ({2 * 2 * model['num_hidden_layers'] * heads * width * tokens / 2**30:.1f} GiB of keys and values)"
    except KeyError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
