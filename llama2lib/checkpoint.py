"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "interleaved_to_halves",
    "halves_to_interleaved",
    "NAMES",
    "layout",
    "config_from_hf",
    "config_to_hf",
    "width_rule",
    "config_from_meta",
    "config_to_meta",
    "read_tensors",
    "local_block",
    "copy_weights",
    "load_checkpoint",
    "save_checkpoint",
    "save_meta",
]


# ---------- chapters/01_architecture.py · Checkpoints

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.distributed.tensor import DTensor

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
}


def layout(name: str) -> tuple[str, int | None]:
    "Hugging Face's name of a parameter of Llama, and the dimension that Meta's files divide."
    layer = re.match(r"layers\.(\d+)\.", name)
    row = NAMES.get(f"layers.*.{name[layer.end() :]}" if layer else name)
    if row is None:
        raise ValueError(f"{name} is not a parameter of Llama")
    return row[0].replace("*", layer[1] if layer else ""), row[1]


def _part(name: str, shape: torch.Size, file: int, files: int) -> tuple[slice, ...]:
    "The part of a parameter that one of Meta's files holds."
    index, dim = [slice(None)] * len(shape), layout(name)[1]
    if dim is not None:
        size = shape[dim] // files
        index[dim] = slice(file * size, (file + 1) * size)
    return tuple(index)


def _meta_model(config: ModelConfig) -> Llama:
    "The model without memory: names and shapes."
    with torch.device("meta"):
        return Llama(config)


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


# ---------- chapters/01_architecture.py · Opening files

@contextmanager
def _naming(file: Path):
    "Put the file's name in front of what is wrong with it."
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated, or not a safetensors file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _read_json(file: Path) -> dict:
    with _naming(file):
        fields = json.loads(file.read_text("utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
        return fields


def _open_safetensors(file: Path):
    with _naming(file):
        return safe_open(file, framework="pt")


def _open_pth(file: Path) -> dict[str, Tensor]:
    with _naming(file):
        try:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged pickle fails in many ways
            if code := re.search(r"GLOBAL (\S+)", str(error)):
                raise ValueError(f"holds {code[1]}, and loading that could run code; expected only tensors") from None
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            raise ValueError(f"truncated, damaged, or not written by torch.save ({reason})") from None
        for name, tensor in tensors.items() if isinstance(tensors, dict) else [("its content", tensors)]:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"expected a dictionary of tensors, but {name} is a {type(tensor).__name__}")
        tensors.pop("rope.freqs", None)  # the rotation's frequencies, which we compute
        return tensors


def _check(where, found: dict[str, Tensor], expected: dict[str, Tensor]):
    "ValueError unless the names are the expected ones, with the expected shapes, and hold floating-point numbers."
    for problem, names in ("lacks", expected.keys() - found.keys()), ("holds unknown", found.keys() - expected.keys()):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {problem} {', '.join(sorted(names)[:3])}{more}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(f"{where}: {name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        if not found[name].is_floating_point():
            raise ValueError(f"{where}: {name} holds {found[name].dtype}, expected floating-point numbers")


# ---------- chapters/01_architecture.py · Reading

_Piece = tuple[str, tuple[slice, ...], Tensor]


def _read_hf(folder: Path) -> tuple[ModelConfig, torch.dtype, Iterator[_Piece]]:
    fields = _read_json(folder / "config.json")
    with _naming(folder / "config.json"):
        config = config_from_hf(fields)
    files, places = [folder / "model.safetensors"], None
    if not files[0].exists():
        index = folder / "model.safetensors.index.json"
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index}: expected a weight_map from tensors to files")
        files = [folder / name for name in sorted(set(places.values()))]
    parameters = dict(_meta_model(config).named_parameters())
    targets = {layout(name)[0]: [name] for name in parameters}

    def tensors():
        for file in files:
            with _open_safetensors(file) as opened:
                for key in opened.keys():
                    here = places is None or places.get(key, file.name) == file.name
                    if here and not key.endswith("rotary_emb.inv_freq"):
                        yield key, opened.get_tensor(key)

    found = {key: tensor.to("meta") for key, tensor in tensors()}
    if fields.get("tie_word_embeddings") and "lm_head.weight" not in found:
        targets["model.embed_tokens.weight"] += targets.pop("lm_head.weight")
    _check(folder, found, {key: parameters[names[0]] for key, names in targets.items()})
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}

    def pieces():
        for key, tensor in tensors():
            if (matrix := key.split(".")[-2]) in heads:
                tensor = halves_to_interleaved(tensor, heads[matrix])
            for name in targets[key]:
                yield name, (slice(None),) * tensor.ndim, tensor

    return config, found["model.embed_tokens.weight"].dtype, pieces()

def _read_meta(folder: Path) -> tuple[ModelConfig, torch.dtype, Iterator[_Piece]]:
    files, params = sorted(folder.glob("consolidated.*.pth")), _read_json(folder / "params.json")
    first, embedding = _open_pth(files[0]), "tok_embeddings.weight"
    wq, w1 = "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"
    if lacking := {embedding, wq, w1} - first.keys():
        raise ValueError(f"{files[0]} lacks {', '.join(sorted(lacking))}")
    with _naming(folder / "params.json"):
        config = config_from_meta(params, len(first[embedding]))
    count, rest = divmod(config.dim, len(first[wq]))
    if rest or not count:
        raise ValueError(f"{files[0]}: {wq} has {len(first[wq])} rows, expected {config.dim} or a fraction of it")
    names = [f"consolidated.{i:02d}.pth" for i in range(count)]
    if wrong := sorted({*names} ^ {file.name for file in files}):
        problem = "is missing" if wrong[0] in names else "should not be there"
        raise FileNotFoundError(f"{folder / wrong[0]} {problem}: {files[0].name} holds 1/{count} of each matrix")
    if config.hidden_dim != len(first[w1]) * count:
        rule = {name: params.get(name) for name in ("dim", "multiple_of", "ffn_dim_multiplier")}
        stored = f"{w1} has {len(first[w1]) * count}"
        raise ValueError(f"{folder / 'params.json'}: {rule} give a width of {config.hidden_dim}, but {stored}")
    model = dict(_meta_model(config).named_parameters())
    for i, file in enumerate(files):
        _check(file, _open_pth(file), {name: p[_part(name, p.shape, i, count)] for name, p in model.items()})

    def pieces():
        for i, file in enumerate(files):
            tensors = _open_pth(file)
            for name, p in model.items():
                if i == 0 or layout(name)[1] is not None:  # the norms are the same in every file
                    yield name, _part(name, p.shape, i, count), tensors[name]
            del tensors  # unmaps this file before the next one is read

    return config, first[embedding].dtype, pieces()

def read_tensors(path) -> tuple[ModelConfig, torch.dtype, Iterator[_Piece]]:
    """Shape, number format and pieces of a checkpoint, checked to be complete, in Meta's names and pair order.

    A piece is (parameter, index, tensor): the tensor belongs in `parameter[index]`. Tensors are views of mapped files:
    copy what you keep. ValueError or FileNotFoundError names the file, tensor or field that is wrong.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds it")
    if not folder.is_dir():
        previous = folder.with_name(f".{folder.name}.previous")
        hint = f"; an interrupted save left the one before in {previous}" if previous.is_dir() else ""
        raise FileNotFoundError(f"{folder}: no such folder{hint}")
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return _read_hf(folder)
    if any(folder.glob("consolidated.*.pth")):
        return _read_meta(folder)
    if pickles := sorted(folder.glob("pytorch_model*.bin")):
        convert = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        raise ValueError(f"{pickles[0]}: expected safetensors; convert the folder with transformers: {convert}")
    raise FileNotFoundError(
        f"{folder}: no checkpoint among {sorted(f.name for f in folder.iterdir())[:8]}; expected config.json with "
        "model.safetensors (or model.safetensors.index.json and the files it names), or params.json with "
        "consolidated.00.pth …"
    )


# ---------- chapters/01_architecture.py · Loading

def local_block(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank holds of a parameter, and which block of the whole that is.

    A matrix may be divided twice: by the last dimension of its device mesh first (tensor parallelism), and what is left
    by the first (FSDP), in equal parts of which the last may be smaller or empty.
    """
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    mesh, start, size = parameter.device_mesh, [0] * parameter.ndim, list(parameter.shape)
    for axis in reversed(range(mesh.ndim)):
        if not parameter.placements[axis].is_replicate():
            dim = parameter.placements[axis].dim
            part = -(-size[dim] // mesh.size(axis))
            skipped = min(part * mesh.get_local_rank(axis), size[dim])
            start[dim], size[dim] = start[dim] + skipped, min(part, size[dim] - skipped)
    return parameter.to_local(), tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


@torch.no_grad()
def copy_weights(model: Llama, pieces: Iterator[_Piece]):
    "Copy the pieces of a checkpoint (see `read_tensors`) into a model, whole or sharded; every rank reads for itself."
    blocks = {name: local_block(parameter) for name, parameter in model.named_parameters()}
    for name, index, tensor in pieces:
        local, block = blocks[name]
        places = [(i.start or 0, held) for i, held in zip(index, block, strict=True)]
        both = [(max(at, b.start), min(at + n, b.stop)) for (at, b), n in zip(places, tensor.shape, strict=True)]
        if all(low < high for low, high in both):
            target, source = (
                tuple(slice(low - at, high - at) for (low, high), at in zip(both, origin, strict=True))
                for origin in ([b.start for b in block], [at for at, _ in places])
            )
            local[target].copy_(tensor[source])


def load_checkpoint(path, device=None, dtype: torch.dtype | None = None) -> Llama:
    """The model in a Hugging Face or Meta folder, whichever it is.

    `device`: PyTorch's default device if None. `dtype`: that of the stored embedding if None. Errors: see
    `read_tensors`.
    """
    config, stored, pieces = read_tensors(path)
    model = (
        _meta_model(config)
        .to(dtype or stored)
        .to_empty(device=torch.get_default_device() if device is None else device)
    )
    copy_weights(model, pieces)
    return model


# ---------- chapters/01_architecture.py · Saving

def _flush(path: Path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def _replacing(path, ours: str):
    "An empty folder to write to; after the block it takes the place of `path`, whose files must match `ours`."
    path = Path(path).expanduser().resolve()
    partial, previous = (path.with_name(f".{path.name}.{end}") for end in ("partial", "previous"))
    if path.exists():
        others = sorted(f.name for f in path.iterdir() if not re.fullmatch(ours, f.name)) if path.is_dir() else [path]
        if others:
            raise FileExistsError(f"{path} holds {others[0]}, which is not ours to replace: save to a new folder")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            _flush(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    partial.rename(path)
    _flush(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _write_json(file: Path, fields: dict):
    file.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


def _whole(parameter: Tensor, dtype: torch.dtype, keep: bool) -> Tensor | None:
    "A parameter on the CPU; of a sharded one all ranks gather the parts, and those that do not `keep` it drop it."
    tensor = parameter.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.to("cpu", dtype).contiguous() if keep else None


def _sharded(model: Llama) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def _writes(model: Llama) -> bool:
    "Whether this process writes the model's files: always, but of a sharded model rank 0 does."
    return not _sharded(model) or dist.get_rank() == 0


def _write_once(model: Llama, files: Iterator, write):
    """`write(files)` where `_writes` says so; `files` gathers tensors as it is read, so other ranks read it as well.

    Whatever goes wrong while writing is raised on every rank. A rank that cannot gather raises alone, at once: the
    others wait for it, and torchrun stops them.
    """
    sharded, error, gathering = _sharded(model), None, False

    def gathered():
        nonlocal gathering
        gathering = True
        for tensors in files:
            gathering = False
            yield tensors
            gathering = True
        gathering = False

    if _writes(model):
        try:
            write(gathered())
        except Exception as caught:
            if gathering:
                raise
            error = caught
    if sharded:
        for _ in files:
            pass
    if sharded:
        message = [error and f"{type(error).__name__}: {error}"]
        dist.broadcast_object_list(message, src=0)
        if message[0] and error is None:
            raise RuntimeError(f"rank 0 could not save: {message[0]}")
    if error is not None:
        raise error


def _tokenizer_file(tokenizer, path, config: ModelConfig) -> Path | None:
    "The tokenizer to store: the one given, or the one that is there. ValueError if it is not the model's."
    file = Path(path).expanduser() / "tokenizer.model" if tokenizer is None else Path(tokenizer.path)
    if tokenizer is None and not file.is_file():
        return None
    if (size := SentencePieceProcessor(model_file=str(file)).vocab_size()) != config.vocab_size:
        raise ValueError(f"{file} has {size} pieces, but the model's vocab_size is {config.vocab_size}")
    return file.resolve()

def _tokenizer_json(pieces: SentencePieceProcessor) -> dict:
    "A SentencePiece BPE model in the format of Hugging Face's tokenizers, with BOS put in front of a text."
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    special = [i for i in range(len(names)) if pieces.is_control(i) or pieces.is_unknown(i)]
    vocab, merges = {name: i for i, name in enumerate(names)}, []
    for i, name in enumerate(names):
        if i not in special and not pieces.is_byte(i):
            splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
            splits = [(left, right) for left, right in splits if left in vocab and right in vocab]
            merges += [(-pieces.get_score(i), vocab[left], vocab[right], (left, right)) for left, right in splits]
    bos = names[pieces.bos_id()]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start, a, b = {"SpecialToken": {"id": bos, "type_id": 0}}, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    spaces = [{"type": "Replace", "pattern": {"String": x}, "content": y} for x, y in (" ▁", "▁ ")]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    template = {"single": [start, a], "pair": [start, a, start, b]}
    template |= {"special_tokens": {bos: {"id": bos, "ids": [pieces.bos_id()], "tokens": [bos]}}}
    model = {"type": "BPE", "unk_token": names[pieces.unk_id()], "fuse_unk": True, "byte_fallback": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": names[i]} | plain for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces[0]]},
        "post_processor": {"type": "TemplateProcessing"} | template,
        "decoder": {"type": "Sequence", "decoders": [spaces[1], {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": model | {"vocab": vocab, "merges": [pair for *_, pair in sorted(merges)]},
    }

def save_checkpoint(
    model: Llama, path, tokenizer=None, shard_bytes: int = 5_000_000_000, dtype: torch.dtype | None = None
):
    """Write a Hugging Face folder, replacing the one that is there, never leaving a broken one.

    `tokenizer`: anything with the `path` of a SentencePiece BPE file; without one, the folder keeps its own. Weights
    that take more than `shard_bytes` go to several files; each is prepared in memory before it is written. `dtype`: the
    numbers' format, the model's if None. Of a sharded model every rank calls this, and rank 0 writes. One process
    writes at a time. ValueError for another vocabulary, FileExistsError for a folder that holds anything else.
    """
    config, dtype = model.config, dtype or model.tok_embeddings.weight.dtype
    vocabulary = _tokenizer_file(tokenizer, path, config)
    pieces = vocabulary and SentencePieceProcessor(model_file=str(vocabulary))
    if (old := Path(path).expanduser() / "config.json").exists() and _read_json(old).get("model_type") != "llama":
        raise FileExistsError(f"{old} is not a Llama's: save to a new folder")
    groups, size = [{}], 0
    for name, p in model.named_parameters():
        if size and size + p.numel() * dtype.itemsize > shard_bytes:
            groups, size = [*groups, {}], 0
        groups[-1][layout(name)[0]], size = p, size + p.numel() * dtype.itemsize
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}
    ours = r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|tokenizer(_config\.json|\.json|\.model)"
    writes = _writes(model)

    def files():
        for group in groups:
            tensors = {key: _whole(p, dtype, keep=writes) for key, p in group.items()}
            for key in tensors if writes else ():
                if (matrix := key.split(".")[-2]) in heads:
                    tensors[key] = interleaved_to_halves(tensors[key], heads[matrix]).contiguous()
            yield tensors

    def write(files):
        with _replacing(path, ours) as folder:
            places = {}
            for i, tensors in enumerate(files, 1):
                file = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
                save_file(tensors, folder / file, metadata={"format": "pt"})
                places |= dict.fromkeys(tensors, file)
            if len(groups) > 1:
                total = {"total_size": config.num_params * dtype.itemsize}
                _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
            ids = {} if pieces is None else {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id()}
            if pieces is not None:
                fields = {f"{name}_token": pieces.id_to_piece(i) for name, i in ids.items()}
                fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
                _write_json(folder / "tokenizer_config.json", fields)
                _write_json(folder / "tokenizer.json", _tokenizer_json(pieces))
                shutil.copyfile(vocabulary, folder / "tokenizer.model")
            _write_json(folder / "config.json", config_to_hf(config, dtype, ids.get("bos", 1), ids.get("eos", 2)))

    _write_once(model, files(), write)

def save_meta(model: Llama, path, shards: int = 1, tokenizer=None, dtype: torch.dtype | None = None):
    """Write Meta's layout, divided for model parallelism into `shards` files; replaces as `save_checkpoint` does.

    `dtype`, and models that are sharded: as there. ValueError if heads, key/value heads, widths or vocabulary do not
    divide. The format has no context length.
    """
    config, dtype = model.config, dtype or model.tok_embeddings.weight.dtype
    for name in ("n_heads", "n_kv_heads", "dim", "hidden_dim", "vocab_size"):
        if shards < 1 or getattr(config, name) % shards:
            raise ValueError(f"{name} = {getattr(config, name)} cannot be divided among {shards} shards")
    vocabulary = _tokenizer_file(tokenizer, path, config)
    writes = _writes(model)

    def files():
        for i in range(shards):
            parts = {}
            for name, p in model.named_parameters():
                whole = _whole(p, dtype, keep=writes)
                if writes:  # a slice would be stored with all of its matrix
                    parts[name] = whole if shards == 1 else whole[_part(name, p.shape, i, shards)].clone()
            yield parts

    def write(files):
        with _replacing(path, r"params\.json|consolidated\.\d\d\.pth|tokenizer\.model") as folder:
            for i, parts in enumerate(files):
                torch.save(parts, folder / f"consolidated.{i:02d}.pth")
            if vocabulary:
                shutil.copyfile(vocabulary, folder / "tokenizer.model")
            _write_json(folder / "params.json", config_to_meta(config))

    _write_once(model, files(), write)
