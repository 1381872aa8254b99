"""Spoils a good checkpoint in one place at a time, loads it, and says what came of it.

    python -m tests.model.checkpoints.import_fuzz FOLDER CASES

FOLDER holds `good` and `sharded`, the same model. A process of its own, so that a crash, a hang and
a huge allocation end it, not the tests: each case has `SECONDS` and `ROOM_BYTES` of address space.
Prints one line of JSON when a case begins and one when it ends. To see a case again, look at
`spoil(kind, number, files)`: it depends on these alone.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_moe.engine import Engine, SamplingParams
from elastic_moe.errors import CheckpointWarning, ElasticMoEError
from elastic_moe.model.checkpoints.weights import INDEX, WEIGHTS
from elastic_moe.model.families import FAMILIES

SECONDS = 5
ROOM_BYTES = 300 << 20

Files = dict[str, bytes]
Random = random.Random


def pick(rng: Random) -> Any:
    """A value that does not belong into JSON."""
    numbers = [0, 1, -1, 2, 3, 7, 255, 1 << 15, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
    numbers += [1 << 32, 1 << 48, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30]
    floats = [0.0, 0.5, -0.5, 1.0, 2.5, 1e-300, 1e-30, 1e29, 1e300, float("nan"), float("inf")]
    texts = ["", "x", "0", "F32", "F64", "F16", "silu", "default", "yarn", "\0", "\ud800", "é" * 9]
    texts += ["../x", "/dev/zero", "model.safetensors", "a" * 100_000, "{{ 1 }}", "[UNK]"]
    others = [None, True, False, [], {}, [0], [[]], [None], ["x"], {"x": 1}, [0] * 100_000]
    others += [nested(50), nested(900), nested(100_000), {"type": "x"}, [1 << 40] * 3]
    return rng.choice(rng.choice([numbers, floats, texts, others]))


def nested(depth: int) -> str:
    """A mark that `dump` replaces with lists in lists."""
    return f"<nested {depth}>"


def dump(value: Any) -> bytes:
    text = json.dumps(value)
    for depth in (50, 900, 100_000):
        text = text.replace(f'"<nested {depth}>"', "[" * depth + "]" * depth)
    return text.encode()


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found = []
    stack = [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                stack.append(node[key])
    return found


def spoil_tree(rng: Random, tree: Any, times: int = 1) -> bytes:
    """JSON with a value replaced, deleted, renamed, repeated or exchanged with another."""
    for _ in range(times):
        container, key = rng.choice(places(tree) or [([0], 0)])
        way = rng.choice(["replace", "replace", "replace", "delete", "exchange", "add"])
        if way == "replace":
            container[key] = pick(rng)
        elif way == "delete":
            del container[key]
        elif way == "exchange":
            other, there = rng.choice(places(tree))
            container[key], other[there] = scalar(other[there]), scalar(container[key])
        elif isinstance(container, list):
            container.insert(key, pick(rng))
        else:
            container[str(pick(rng))[:100]] = container[key]
    return dump(tree)


def scalar(value: Any) -> Any:
    """Containers are not exchanged: one could end up within itself."""
    return None if isinstance(value, (dict, list)) else value


def spoil_bytes(rng: Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """Change, insert or delete a few bytes in [first, last)."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(first, max(first + 1, min(last or len(changed), len(changed))))
        way = rng.choice(["set", "flip", "insert", "delete", "digit"])
        if way == "set":
            changed[at] = rng.randrange(256)
        elif way == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        elif way == "insert":
            changed[at:at] = rng.choice([b"0", b"9", b"-", b'"', b"{", b"]", b",", b"\0", b"\xff"])
        elif way == "delete":
            del changed[at : at + rng.choice([1, 1, 8])]
        else:
            digits = [i for i in range(first, last or len(changed)) if chr(changed[i]).isdigit()]
            if digits:
                changed[rng.choice(digits)] = ord(rng.choice("0123456789"))
        if len(changed) <= first:
            break
    return bytes(changed)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


# What is spoiled. Each returns the files that change.


def header_bytes(rng: Random, files: Files) -> Files:
    data = files[WEIGHTS]
    return {WEIGHTS: spoil_bytes(rng, data, 0, 8 + int.from_bytes(data[:8], "little"))}


def header_json(rng: Random, files: Files) -> Files:
    header, data = split(files[WEIGHTS])
    return {WEIGHTS: join(spoil_tree(rng, header, rng.choice([1, 1, 2])), data)}


def offsets(rng: Random, files: Files) -> Files:
    """Numbers of a tensor that nearly go together."""
    header, data = split(files[WEIGHTS])
    entry, other = (header[rng.choice(tensors(header))] for _ in range(2))
    by = rng.choice([1, 2, 4, 8, 64, 4096, 1 << 31, 1 << 40, 1 << 62]) * rng.choice([1, -1])
    way = rng.randrange(6)
    if way == 0:
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    elif way == 1:
        entry["data_offsets"][rng.randrange(2)] += by
    elif way == 2:
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif way == 3:
        entry["shape"], other["shape"] = other["shape"], entry["shape"]
    elif way == 4:  # the data would need as much as the shape says
        entry["shape"] = [rng.choice([1 << 20, 1 << 31, 1 << 40]), *entry["shape"]]
        entry["data_offsets"][1] = entry["data_offsets"][0] + (1 << 40)
    else:
        entry["shape"] = rng.choice(
            [[0], entry["shape"][::-1], [*entry["shape"], 1], [1 << 47] * 8]
        )
    return {WEIGHTS: join(dump(header), data)}


def data_length(rng: Random, files: Files) -> Files:
    """Cut, extended, or with another length of the header."""
    data = files[WEIGHTS]
    length = int.from_bytes(data[:8], "little")
    way = rng.randrange(4)
    if way == 0:
        return {WEIGHTS: data[: rng.randrange(len(data))]}
    if way == 1:
        return {WEIGHTS: data[: rng.randrange(8 + length + 9)]}
    if way == 2:
        return {WEIGHTS: data + bytes(rng.choice([1, 7, 8, 4096]))}
    claims = [0, 1, length - 1, length + 1, len(data), 16 << 20, 1 << 31, 1 << 40, (1 << 64) - 1]
    return {WEIGHTS: rng.choice(claims).to_bytes(8, "little") + data[8:]}


def data_values(rng: Random, files: Files) -> Files:
    """Weights of any bits: huge, NaN, infinite."""
    data = bytearray(files[WEIGHTS])
    first = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 3, 100])):
        at = first + rng.randrange((len(data) - first) // 2) * 2
        data[at : at + 2] = rng.choice([b"\x7f\x7f", b"\x80\xff", b"\xc0\x7f", rng.randbytes(2)])
    return {WEIGHTS: bytes(data)}


def huge_weights(rng: Random, files: Files) -> Files:
    """A whole tensor that is finite, but whose products are not."""
    header, data = split(files[WEIGHTS])
    begin, end = header[rng.choice(tensors(header))]["data_offsets"]
    value = rng.choice([b"\x7f\x7f", b"\x7f\xff", b"\x00\x60", b"\x01\x00", b"\x00\x00"])
    return {WEIGHTS: join(dump(header), data[:begin] + value * ((end - begin) // 2) + data[end:])}


def config_key(rng: Random, files: Files) -> Files:
    config = json.loads(files["config.json"])
    extra = ["num_local_experts", "sliding_window", "rope_parameters", "rope_scaling", "auto_map"]
    extra += ["layer_types", "quantization_config", "clip_qkv", "moe_k", "unknown"]
    for _ in range(rng.choice([1, 1, 2])):
        config[rng.choice([*config, *extra])] = pick(rng)
    return {"config.json": dump(config)}


def config_free(rng: Random, files: Files) -> Files:
    """Keys that no tensor's shape holds in check."""
    config = json.loads(files["config.json"])
    keys = ["max_position_embeddings", "num_experts_per_tok", "mlp_only_layers", "rms_norm_eps"]
    keys += ["rope_theta", "norm_topk_prob", "decoder_sparse_step"]
    size = rng.choice([1, 2, 3, 1 << 15, 1 << 20, (1 << 24) - 1, 1 << 24])
    config[rng.choice(keys)] = rng.choice([size, [size], [[size]], pick(rng)])
    return {"config.json": dump(config)}


def config_tree(rng: Random, files: Files) -> Files:
    config = json.loads(files["config.json"])
    if rng.random() < 0.3:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": pick(rng)}
    if rng.random() < 0.3:
        config["elastic_moe"][rng.choice(list(config["elastic_moe"]))] = pick(rng)
    if rng.random() < 0.2:
        config["model_type"] = rng.choice([*sorted(FAMILIES), "llama"])
    return {"config.json": spoil_tree(rng, config)}


def bytes_of(name: str) -> Callable[[Random, Files], Files]:
    return lambda rng, files: {name: spoil_bytes(rng, files[name])}


def tree_of(name: str) -> Callable[[Random, Files], Files]:
    return lambda rng, files: {
        name: spoil_tree(rng, json.loads(files[name]), rng.choice([1, 1, 1, 3]))
    }


def index_map(rng: Random, files: Files) -> Files:
    """Tensors that lie elsewhere, shards that are others."""
    index = json.loads(files[INDEX])
    table = index["weight_map"]
    shards = [*sorted(set(table.values())), "config.json", "../good/model.safetensors", ".", ""]
    for _ in range(rng.choice([1, 1, 5])):
        table[rng.choice([*table, "extra"])] = rng.choice([*shards, str(pick(rng))])
    return {INDEX: dump(index)}


def special_ids(rng: Random, files: Files) -> Files:
    name = rng.choice(["config.json", "generation_config.json"])
    data = json.loads(files[name])
    data[rng.choice(["bos_token_id", "eos_token_id", "pad_token_id"])] = pick(rng)
    return {name: dump(data)}


def tokenizer_part(rng: Random, files: Files) -> Files:
    """The parts of tokenizer.json that decide lengths and kinds."""
    tree = json.loads(files["tokenizer.json"])
    size = pick(rng)
    parts: dict[str, Any] = {
        "padding": {
            "strategy": rng.choice(["BatchLongest", {"Fixed": size}]),
            "direction": "Right",
            "pad_to_multiple_of": rng.choice([None, size]),
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
        "truncation": {
            "direction": "Right",
            "max_length": rng.choice([0, 1, 3, size]),
            "strategy": "LongestFirst",
            "stride": rng.choice([0, 2, size]),
        },
        "added_tokens": [{**tree["added_tokens"][0], "id": size, "content": rng.choice("x=1a")}],
        "decoder": {"type": rng.choice(["ByteLevel", "Fuse", "ByteFallback", "WordPiece", "x"])},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {rng.choice(["Regex", "String"]): rng.choice(["(", "", ".", "(?=a)", "\\"])},
            "behavior": "Isolated",
            "invert": False,
        },
        "normalizer": {"type": "Prepend", "prepend": "a" * rng.choice([0, 1, 10_000])},
        "model": {**tree["model"], rng.choice(["unk_token", "dropout", "byte_fallback"]): size},
    }
    name = rng.choice(list(parts))
    tree[name] = parts[name]
    return {"tokenizer.json": dump(tree)}


KINDS: dict[str, Callable[[Random, Files], Files]] = {
    "header-bytes": header_bytes,
    "header-json": header_json,
    "offsets": offsets,
    "data-length": data_length,
    "data-values": data_values,
    "huge-weights": huge_weights,
    "config-key": config_key,
    "config-free": config_free,
    "config-tree": config_tree,
    "config-bytes": bytes_of("config.json"),
    "index-map": index_map,
    "index-tree": tree_of(INDEX),
    "index-bytes": bytes_of(INDEX),
    "tokenizer-part": tokenizer_part,
    "tokenizer-tree": tree_of("tokenizer.json"),
    "tokenizer-bytes": bytes_of("tokenizer.json"),
    "tokenizer-config-tree": tree_of("tokenizer_config.json"),
    "tokenizer-config-bytes": bytes_of("tokenizer_config.json"),
    "generation-config-tree": tree_of("generation_config.json"),
    "special-ids": special_ids,
}


def spoil(kind: str, number: int, files: Files) -> Files:
    """The files of one case that differ from the good ones."""
    return KINDS[kind](Random(f"{kind} {number}"), files)


# Running


def attempt(folder: Path, number: int) -> str:
    """Load and generate a little; the name of what was raised, or 'ran'."""
    sampling = SamplingParams(max_tokens=2, temperature=float(number % 2), logprobs=number % 3)
    try:
        engine = Engine.from_pretrained(folder)
        engine.generate("x = 1 + a\n", sampling=sampling)
    except ElasticMoEError as error:
        return type(error).__name__ if str(error) else "an error without a message"
    except Exception as error:  # noqa: BLE001  # what must not happen is what is looked for
        return f"untyped {type(error).__name__}: {error}"[:300]
    except BaseException as error:  # a panic of native code is no Exception
        if type(error).__name__ != "PanicException":
            raise
        return f"untyped panic: {error}"[:300]
    return "ran"


def main(root: Path, cases: int) -> None:
    warnings.simplefilter("ignore", CheckpointWarning)
    folders = {name: read(root / name) for name in ("good", "sharded")}
    if any(attempt(root / name, n) != "ran" for name in folders for n in range(2)):
        raise SystemExit("the checkpoints are not good to begin with")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even in native code
    work = root / "work"
    for kind in KINDS:
        good = folders["sharded" if kind.startswith("index") else "good"]
        shutil.rmtree(work, ignore_errors=True)
        write(work, good)
        for number in range(cases):
            print(json.dumps([kind, number]), flush=True)  # noqa: T201  # the way to the tests
            changed = spoil(kind, number, good)
            write(work, changed)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            began = time.perf_counter()
            outcome = attempt(work, number)
            seconds = time.perf_counter() - began
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps([kind, number, outcome, seconds]), flush=True)  # noqa: T201
            write(work, {name: good[name] for name in changed})


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: Files) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
