"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "read_tensors",
    "local_block",
    "copy_weights",
    "load_checkpoint",
    "whole",
    "save_checkpoint",
    "save_meta",
]


# ---------- chapters/01_architecture.py · Opening files

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2lib.formats import (
    config_from_hf,
    config_from_meta,
    config_to_hf,
    config_to_meta,
    halves_to_interleaved,
    interleaved_to_halves,
    is_reward_model,
    layout,
    part_of_file,
    reward_fields,
    without_memory,
)
from llama2lib.model import Llama, ModelConfig


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


def _read_hf(folder: Path, kind: type[Llama]) -> tuple[ModelConfig, torch.dtype, Iterator[_Piece]]:
    fields = _read_json(folder / "config.json")
    with _naming(folder / "config.json"):
        config = config_from_hf(fields)
        model = without_memory(config, kind)
        named, score = fields.get("architectures"), is_reward_model(model)
        if named and ("SequenceClassification" in str(named)) != score:
            raise ValueError(f"architectures = {named}; expected a {'reward' if score else 'language'} model")
    files, places = [folder / "model.safetensors"], None
    if not files[0].exists():
        index = folder / "model.safetensors.index.json"
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(f"{index}: expected a weight_map from tensors to files")
        files = [folder / name for name in sorted(set(places.values()))]
    parameters = dict(model.named_parameters())
    targets = {layout(name)[0]: [name] for name in parameters}

    def tensors():
        for file in files:
            with _open_safetensors(file) as opened:
                for key in opened.keys():
                    here = places is None or places.get(key, file.name) == file.name
                    if here and not key.endswith("rotary_emb.inv_freq"):
                        yield key, opened.get_tensor(key)

    found = {key: tensor.to("meta") for key, tensor in tensors()}
    if fields.get("tie_word_embeddings") and "lm_head.weight" in targets and "lm_head.weight" not in found:
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
    model = dict(without_memory(config).named_parameters())
    for i, file in enumerate(files):
        _check(file, _open_pth(file), {name: p[part_of_file(name, p.shape, i, count)] for name, p in model.items()})

    def pieces():
        for i, file in enumerate(files):
            tensors = _open_pth(file)
            for name, p in model.items():
                if i == 0 or layout(name)[1] is not None:  # the norms are the same in every file
                    yield name, part_of_file(name, p.shape, i, count), tensors[name]
            del tensors  # unmaps this file before the next one is read

    return config, first[embedding].dtype, pieces()

def read_tensors(path, kind: type[Llama] = Llama) -> tuple[ModelConfig, torch.dtype, Iterator[_Piece]]:
    """Shape, number format and pieces of a checkpoint, checked to be complete, in Meta's names and pair order.

    `kind`: the class of the model, `reward.RewardModel` for a sequence classifier of Hugging Face.
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
        return _read_hf(folder, kind)
    if any(folder.glob("consolidated.*.pth")):
        if kind is not Llama:
            raise ValueError(f"{folder}: Meta's layout holds language models; expected a reward model's folder")
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


def load_checkpoint(path, device=None, dtype: torch.dtype | None = None, kind: type[Llama] = Llama) -> Llama:
    """The model in a Hugging Face or Meta folder, whichever it is.

    `device`: PyTorch's default device if None. `dtype`: that of the stored embedding if None. `kind` and errors: see
    `read_tensors`.
    """
    config, stored, pieces = read_tensors(path, kind)
    model = (
        without_memory(config, kind)
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


def whole(tensor: Tensor) -> Tensor:
    "A tensor, or all of one that is divided among ranks, which then all have to ask for it."
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(parameter: Tensor, dtype: torch.dtype, keep: bool) -> Tensor | None:
    "A whole parameter on the CPU; ranks that do not `keep` it drop it."
    tensor = whole(parameter.detach())
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
            tensors = {key: _gathered(p, dtype, keep=writes) for key, p in group.items()}
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
                total = {"total_size": sum(p.numel() for p in model.parameters()) * dtype.itemsize}
                _write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
            ids = {} if pieces is None else {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id()}
            if pieces is not None:
                fields = {f"{name}_token": pieces.id_to_piece(i) for name, i in ids.items()}
                fields |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
                _write_json(folder / "tokenizer_config.json", fields)
                _write_json(folder / "tokenizer.json", _tokenizer_json(pieces))
                shutil.copyfile(vocabulary, folder / "tokenizer.model")
            fields = config_to_hf(config, dtype, ids.get("bos", 1), ids.get("eos", 2))
            fields |= reward_fields(ids.get("unk", 0)) if is_reward_model(model) else {}
            _write_json(folder / "config.json", fields)

    _write_once(model, files(), write)

def save_meta(model: Llama, path, shards: int = 1, tokenizer=None, dtype: torch.dtype | None = None):
    """Write Meta's layout, divided for model parallelism into `shards` files; replaces as `save_checkpoint` does.

    `dtype`, and models that are sharded: as there. ValueError if heads, key/value heads, widths or vocabulary do not
    divide. The format has no context length.
    """
    config, dtype = model.config, dtype or model.tok_embeddings.weight.dtype
    if is_reward_model(model):
        raise ValueError("Meta's layout holds language models; save a reward model with save_checkpoint")
    for name in ("n_heads", "n_kv_heads", "dim", "hidden_dim", "vocab_size"):
        if shards < 1 or getattr(config, name) % shards:
            raise ValueError(f"{name} = {getattr(config, name)} cannot be divided among {shards} shards")
    vocabulary = _tokenizer_file(tokenizer, path, config)
    writes = _writes(model)

    def files():
        for i in range(shards):
            parts = {}
            for name, p in model.named_parameters():
                tensor = _gathered(p, dtype, keep=writes)
                if writes:  # a slice would be stored with all of its matrix
                    parts[name] = tensor if shards == 1 else tensor[part_of_file(name, p.shape, i, shards)].clone()
            yield parts

    def write(files):
        with _replacing(path, r"params\.json|consolidated\.\d\d\.pth|tokenizer\.model") as folder:
            for i, parts in enumerate(files):
                torch.save(parts, folder / f"consolidated.{i:02d}.pth")
            if vocabulary:
                shutil.copyfile(vocabulary, folder / "tokenizer.model")
            _write_json(folder / "params.json", config_to_meta(config))

    _write_once(model, files(), write)
