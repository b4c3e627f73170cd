"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "interleaved_to_halves",
    "halves_to_interleaved",
    "NAMES",
    "layout",
    "part_of_file",
    "without_memory",
    "is_reward_model",
    "config_from_hf",
    "config_to_hf",
    "reward_fields",
    "width_rule",
    "config_from_meta",
    "config_to_meta",
]


# ---------- chapters/01_architecture.py · Checkpoints

import re

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llama2lib.model import Llama, ModelConfig, swiglu_width


# ---------- chapters/01_architecture.py · The order of the rotary pairs

def interleaved_to_halves(weight: Float[Tensor, "N*H D"], n_heads: int) -> Float[Tensor, "N*H D"]:
    "Reorder the rows of wq (n_heads) or wk (n_kv_heads) from Meta's pairs to Hugging Face's."
    return rearrange(weight, "(n pair two) d -> (n two pair) d", n=n_heads, two=2)


def halves_to_interleaved(weight: Float[Tensor, "N*H D"], n_heads: int) -> Float[Tensor, "N*H D"]:
    "Reorder the rows of q_proj (n_heads) or k_proj (n_kv_heads) from Hugging Face's pairs to Meta's."
    return rearrange(weight, "(n two pair) d -> (n pair two) d", n=n_heads, two=2)


# ---------- chapters/01_architecture.py · Names

NAMES = {  # Meta: (Hugging Face, dimension that several files divide; None: every file holds a copy)
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "layers.*.attention.wq.weight": ("model.layers.*.self_attn.q_proj.weight", 0),
    "layers.*.attention.wk.weight": ("model.layers.*.self_attn.k_proj.weight", 0),
    "layers.*.attention.wv.weight": ("model.layers.*.self_attn.v_proj.weight", 0),
    "layers.*.attention.wo.weight": ("model.layers.*.self_attn.o_proj.weight", 1),
    "layers.*.feed_forward.w1.weight": ("model.layers.*.mlp.gate_proj.weight", 0),
    "layers.*.feed_forward.w2.weight": ("model.layers.*.mlp.down_proj.weight", 1),
    "layers.*.feed_forward.w3.weight": ("model.layers.*.mlp.up_proj.weight", 0),
    "layers.*.attention_norm.weight": ("model.layers.*.input_layernorm.weight", None),
    "layers.*.ffn_norm.weight": ("model.layers.*.post_attention_layernorm.weight", None),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "score.weight": ("score.weight", None),  # of a reward model, where a language model has `output` (chapter 04)
}


def layout(name: str) -> tuple[str, int | None]:
    "Hugging Face's name of a parameter of Llama, and the dimension that Meta's files divide."
    layer = re.match(r"layers\.(\d+)\.", name)
    row = NAMES.get(f"layers.*.{name[layer.end() :]}" if layer else name)
    if row is None:
        raise ValueError(f"{name} is not a parameter of Llama")
    return row[0].replace("*", layer[1] if layer else ""), row[1]


def part_of_file(name: str, shape: torch.Size, file: int, files: int) -> tuple[slice, ...]:
    "The part of a parameter that one of Meta's files holds."
    index, dim = [slice(None)] * len(shape), layout(name)[1]
    if dim is not None:
        size = shape[dim] // files
        index[dim] = slice(file * size, (file + 1) * size)
    return tuple(index)


def without_memory(config: ModelConfig, kind: type[Llama] = Llama) -> Llama:
    "The model without memory: names and shapes."
    with torch.device("meta"):
        return kind(config)


def is_reward_model(model: Llama) -> bool:
    "Whether this is a reward model: one with a score instead of the logits of a next token (chapter 04)."
    return hasattr(model, "score")


# ---------- chapters/01_architecture.py · The shape of the model

_HF_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_HF_CONSTANTS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _number(fields: dict, name: str, kind: type, default=None):
    "A number of a JSON file; the default, if there is one, where it is absent or null."
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise ValueError(f"the field '{name}' is missing")
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise ValueError(f"{name} = {value!r}, expected {'an integer' if kind is int else 'a number'}")
    return value


def _model_config(fields: dict, names: dict[str, str]) -> ModelConfig:
    "ModelConfig from JSON; `names`: ours → the file's. Absent: as many key/value heads as heads, and θ = 10,000."
    defaults = {"n_kv_heads": fields.get(names["n_heads"]), "rope_theta": 10_000.0}
    kinds = {name: type(value) for name, value in vars(ModelConfig()).items()}
    return ModelConfig(**{our: _number(fields, name, kinds[our], defaults.get(our)) for our, name in names.items()})


def config_from_hf(fields: dict) -> ModelConfig:
    "The shape in a Hugging Face config.json. ValueError, naming the field, for what Llama 2 does not have."
    for name, only in (_HF_CONSTANTS | {"quantization_config": None}).items():
        value = fields.get(name)
        if value != only and (value is not None or name == "model_type"):
            raise ValueError(f"{name} = {value!r} is not Llama 2's; expected {only!r}")
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4, 5
        if not isinstance(fields.get(name), dict | None):
            raise ValueError(f"{name} = {fields[name]!r}, expected an object")
        rope = dict(fields.get(name) or {})
        fields = fields | {"rope_theta": rope.pop("rope_theta", fields.get("rope_theta"))}
        if any(value not in ("default", None, 1.0) for value in rope.values()):
            raise ValueError(f"{name} = {fields[name]!r} changes the rotation; expected type 'default'")
    config = _model_config(fields, _HF_FIELDS)
    if fields.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"head_dim = {fields['head_dim']!r}, expected {config.head_dim} (hidden_size / heads)")
    return config


def config_to_hf(config: ModelConfig, dtype: torch.dtype, bos_id: int = 1, eos_id: int = 2) -> dict:
    "The fields of a config.json; the rotation's base twice, since transformers 4 and 5 look in different places."
    fields = {"architectures": ["LlamaForCausalLM"], "torch_dtype": str(dtype).removeprefix("torch.")} | _HF_CONSTANTS
    fields |= {name: getattr(config, our) for our, name in _HF_FIELDS.items()} | {"head_dim": config.head_dim}
    fields |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    return fields | {"tie_word_embeddings": False, "bos_token_id": bos_id, "eos_token_id": eos_id}


def reward_fields(pad_id: int = 0) -> dict:
    "The fields in which a reward model's config.json differs; transformers looks for the last token that is no pad."
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": pad_id} | labels

def width_rule(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    "(multiple_of, ffn_dim_multiplier) from which `swiglu_width` computes `hidden_dim`; the released ones if they do."
    for multiple_of, multiplier in ((256, None), (4096, 1.3)):
        if swiglu_width(dim, multiple_of, multiplier or 1.0) == hidden_dim:
            return multiple_of, multiplier
    return 1, (hidden_dim + 0.5) / int(2 * 4 * dim / 3)  # the half keeps clear of the rounding to an integer


def config_from_meta(params: dict, vocab_size: int) -> ModelConfig:
    "The shape in Meta's params.json; `vocab_size`: rows of the embedding, for files that say -1."
    known = {*vars(ModelConfig()), "multiple_of", "ffn_dim_multiplier", "max_batch_size"} - {"hidden_dim"}
    if strange := [name for name in params if name not in known and params[name]]:
        raise ValueError(f"{strange[0]} = {params[strange[0]]!r} is not Llama 2's; expected {', '.join(sorted(known))}")
    dim, multiple_of = _number(params, "dim", int), _number(params, "multiple_of", int, 256)
    if multiple_of < 1:
        raise ValueError(f"multiple_of = {multiple_of}, expected at least 1")
    fields = {"max_seq_len": 4096, "norm_eps": 1e-5} | {name: v for name, v in params.items() if v is not None}
    fields["hidden_dim"] = swiglu_width(dim, multiple_of, _number(params, "ffn_dim_multiplier", float, 1.0))
    if params.get("vocab_size") in (None, -1):
        fields["vocab_size"] = vocab_size
    return _model_config(fields, {name: name for name in vars(ModelConfig())})


def config_to_meta(config: ModelConfig) -> dict:
    "The fields of a params.json, without the context length: Meta's programs take it as an argument."
    multiple_of, multiplier = width_rule(config.dim, config.hidden_dim)
    fields = vars(config) | {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    fields |= {"hidden_dim": None, "max_seq_len": None}
    fields |= {"rope_theta": None if config.rope_theta == 10_000 else config.rope_theta}
    return {name: value for name, value in fields.items() if value is not None}
