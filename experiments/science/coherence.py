"""What a user of a reduced network loses in long contexts and in what it writes.

    python -m experiments.science.coherence --novels DIR --out benchmarks/results/coherence.jsonl

Three measurements of every sub-network of the list, each beside the full network:

- Loss by position. Windows of 2,048 tokens, BOS first: position i has i tokens of context. Mean
  nats per token and mean KL(full || sub-network) of every 64 positions, with the loss against the
  full network and its standard error over windows. elastic-mini was trained on at most 512 tokens,
  so all beyond is extrapolation: at the last 512 positions, `long_context` is the loss with the
  whole context minus the loss of the same tokens with 256 to 511 tokens of context.
- Written text. 32 prompts of 32 tokens, 128 more written, greedily and at temperature 0.8 (seed =
  index of the prompt), past end tokens. Repetition, distinct-n, and perplexity under the full
  network; `human` is what the text really goes on with.
- Divergence. Greedy texts against the full network's, on the same prompts: first difference, share
  of equal tokens; and KL(full || sub-network) along the full network's text, by its position.

Each formula stands in formulas.py. --out keeps the lines of other checkpoints; the picture goes
beside it. Quiet machine or not, the numbers are the same: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.result_file import replace_lines
from elastic_moe import SamplingParams
from elastic_moe.engine import Engine
from elastic_moe.engine.running.runner import Chunk, ModelRunner
from elastic_moe.errors import CorpusError, ElasticMoEError
from elastic_moe.lab.provenance import describe_provenance
from elastic_moe.lab.sweeps.text import Corpus, language_reference
from elastic_moe.routing import Subnet
from elastic_moe.train.text import PIECE_TOKENS
from experiments.science.coherence_picture import write_picture
from experiments.science.formulas import (
    by_position,
    distinct_share,
    divergence,
    errors_by_position,
    mean_and_error,
    perplexity,
    repeated_share,
)
from experiments.science.measuring import AUTHORS, REFERENCE, excerpts

# One pass over the deepest of each gives all its depths; the full network first.
BUNDLES: dict[str, tuple[int, ...]] = {
    "full": (48, 36, 24, 12),
    "k2": (48,),
    "k1": (48,),
    "w4": (48,),
    "p8": (48,),
    "L36-k2-w6-t0.7": (36,),
}
LENGTH, BIN = 2048, 64
TRAINED, STRIDE = PIECE_TOKENS, PIECE_TOKENS // 2  # no sequence of training is longer
WINDOWS = 8  # of each text
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 32, 128  # prompts of each text
SEEN_EDGES = (0, 16, 32, 64, 128)  # positions of a written text
TEMPERATURE = 0.8  # of sampled text

Tokens = Mapping[str, Sequence[Sequence[int]]]  # text -> pieces of ids, each of one source


@dataclass(frozen=True, slots=True)
class Scored:
    """Sequences under one sub-network: nats and KL(full || it), each (S, T)."""

    nats: np.ndarray
    kl: np.ndarray


def read_texts(engine: Engine, novels: Path | None) -> tuple[dict[str, Corpus], Tokens]:
    """The texts, and their ids: the language reference whole, the novels excerpt by excerpt."""
    corpora, pieces = {REFERENCE: language_reference()}, {}
    pieces[REFERENCE] = [corpora[REFERENCE].text]
    if novels is not None:
        found = list(excerpts(novels).values())
        corpora[AUTHORS], pieces[AUTHORS] = Corpus(AUTHORS, "\n\n".join(found)), found
    encode = engine.tokenizer.fast.encode
    ids = {
        name: [encode(text, add_special_tokens=False).ids for text in texts]
        for name, texts in pieces.items()
    }
    return corpora, ids


def stretches(pieces: Sequence[Sequence[int]], count: int, length: int) -> list[list[int]]:
    """`count` stretches of so many ids, spread evenly, none across two pieces.

    Raises:
        CorpusError: there is not that much text.
    """
    places = [(p, i) for p in pieces for i in range(0, len(p) - length + 1, length)]
    if len(places) < count:
        raise CorpusError(
            f"the text gives {len(places)} stretches of {length} tokens, {count} are needed."
        )
    chosen = (places[i * len(places) // count] for i in range(count))
    return [list(piece[start : start + length]) for piece, start in chosen]


def read_sequences(
    runner: ModelRunner, deepest: Subnet, depths: Sequence[int], inputs: Sequence[Sequence[int]]
) -> dict[int, Tensor]:
    """Log-probabilities (S, T, V) of what follows every token, for every depth."""
    chunks = [Chunk(runner.open(deepest, len(ids)), ids, "none") for ids in inputs]
    out = runner.run(chunks, states_after=depths)
    shape = (len(inputs), len(inputs[0]), -1)
    return {
        depth: torch.from_numpy(runner.logits(out.states[depth])).log_softmax(dim=-1).view(shape)
        for depth in depths
    }


def score(
    engine: Engine, bundles: Mapping[str, Sequence[int]], targets: Sequence[Sequence[int]]
) -> dict[str, Scored]:
    """Every sub-network on sequences of ids, all of one length, each after a BOS.

    Every id is predicted from those before it. The first bundle begins with the full network.
    """
    bos = list(engine.tokenizer.prefix[:1])
    nats: dict[str, list[Tensor]] = {}
    kl: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for some in _batches(targets):
            inputs = [[*bos, *ids][: len(ids)] for ids in some]
            wanted = torch.tensor(some).unsqueeze(2)
            full, certain = torch.empty(0), torch.empty(0)
            for name, depths in bundles.items():
                deepest = engine.resolve(name)
                found = read_sequences(engine.runner, deepest, depths, inputs)
                if not len(full):  # the first pass: all others are compared with it
                    full = found[deepest.depth].exp()  # (s, T, V)
                    certain = torch.linalg.vecdot(full, found[deepest.depth])  # sum p log p
                for depth, predicted in found.items():
                    one = deepest.at_depth(depth).name
                    nats.setdefault(one, []).append(-predicted.gather(2, wanted).squeeze(2))
                    kl.setdefault(one, []).append(certain - torch.linalg.vecdot(full, predicted))
    return {
        name: Scored(torch.cat(nats[name]).double().numpy(), torch.cat(kl[name]).double().numpy())
        for name in nats
    }


def _batches(targets: Sequence[Sequence[int]], tokens: int = 4096) -> Iterator[list[list[int]]]:
    size = max(1, tokens // len(targets[0]))
    for start in range(0, len(targets), size):
        yield [list(ids) for ids in targets[start : start + size]]


def short_context(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """What predicts the last 512 ids of every window from 256 to 511 ids before each.

    Two stretches of 512 per window, of which the second halves count.
    """
    last = len(windows[0]) - TRAINED
    return [
        list(ids[start : start + TRAINED]) for ids in windows for start in (last - STRIDE, last)
    ]


def measure_positions(engine: Engine, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Loss and KL by position, and what the context beyond the trained length does."""
    edges = range(0, LENGTH + 1, BIN)
    long = score(engine, BUNDLES, windows)
    short = score(engine, BUNDLES, short_context(windows))
    measured = {}
    for name, scored in long.items():
        lost = scored.nats - long["full"].nats
        # (2 W, 512) -> the scored halves, (W, 512)
        near = short[name].nats[:, STRIDE:].reshape(len(windows), TRAINED)
        change, error = mean_and_error(scored.nats[:, -TRAINED:] - near)
        measured[name] = {
            "nats": _short(by_position(scored.nats, edges)),
            "lost": _short(by_position(lost, edges)),
            "standard_error": _short(errors_by_position(lost, edges)),
            "kl": _short(by_position(scored.kl, edges)),
            "within": round(float(scored.nats[:, :TRAINED].mean()), 4),
            "beyond": round(float(scored.nats[:, TRAINED:].mean()), 4),
            "long_context": {"nats": round(change, 4), "standard_error": round(error, 4)},
        }
    return measured


def write_texts(
    engine: Engine, names: Sequence[str], prompts: Sequence[Sequence[int]]
) -> dict[str, dict[str, list[list[int]]]]:
    """{'greedy' | 'sampled': {sub-network: the ids that it writes after every prompt}}."""
    bos = list(engine.tokenizer.prefix[:1])
    asked = [[*bos, *ids] for ids in prompts]
    found: dict[str, dict[str, list[list[int]]]] = {"greedy": {}, "sampled": {}}
    for kind, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        how = [
            SamplingParams(NEW_TOKENS, temperature=temperature, seed=i, ignore_eos=True)
            for i in range(len(asked))
        ]
        for name in names:
            done = engine.generate(asked, name, how)
            found[kind][name] = [list(one.token_ids) for one in done]
    return found


def describe_writing(
    engine: Engine, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Repetition, distinct-n and perplexity under the full network of texts after prompts."""
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    full = {"full": (engine.shape.num_layers,)}
    nats = score(engine, full, whole)["full"].nats[:, len(prompts[0]) :]
    figures = {"repeated_4": repeated_share(texts, 4)}
    figures |= {f"distinct_{n}": distinct_share(texts, n) for n in (1, 2, 3)}
    figures["perplexity_under_full"] = perplexity(nats)
    return {key: round(value, 4) for key, value in figures.items()}


def measure_writing(
    engine: Engine, prompts: Sequence[Sequence[int]], human: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """What every sub-network writes after the prompts, and how far from the full network."""
    names = [engine.resolve(n).at_depth(d).name for n, depths in BUNDLES.items() for d in depths]
    written = write_texts(engine, names, prompts)
    whole = [[*p, *text] for p, text in zip(prompts, written["greedy"]["full"], strict=True)]
    along = score(engine, BUNDLES, whole)
    writing: dict[str, Any] = {"human": {"text": describe_writing(engine, prompts, human)}}
    for name in names:
        writing[name] = {
            kind: describe_writing(engine, prompts, texts[name]) for kind, texts in written.items()
        }
        apart = divergence(written["greedy"]["full"], written["greedy"][name])
        kl = along[name].kl[:, len(prompts[0]) :]
        writing[name]["divergence"] = apart | {"kl_along_full": _short(by_position(kl, SEEN_EDGES))}
    return writing


def measure(engine: Engine, novels: Path | None) -> dict[str, Any]:
    """The whole line of results."""
    corpora, tokens = read_texts(engine, novels)
    positions, prompts, human = {}, [], []
    for name, pieces in tokens.items():
        tell(f"{name}: loss by position")
        positions[name] = measure_positions(engine, stretches(pieces, WINDOWS, LENGTH))
        for ids in stretches(pieces, PROMPTS, PROMPT_TOKENS + NEW_TOKENS):
            prompts.append(ids[:PROMPT_TOKENS])
            human.append(ids[PROMPT_TOKENS:])
    tell(f"{len(prompts)} prompts: writing")
    return {
        "benchmark": "coherence",
        "case": engine.name,
        "weights_sha256": engine.weights_sha256,
        "dtype": engine.dtype,
        "backend": engine.backend,
        "texts": {
            name: {
                "sha256": corpus.sha256,
                "num_bytes": len(corpus.text.encode()),
                "windows": WINDOWS,
                "window": LENGTH,
                "prompts": PROMPTS,
            }
            for name, corpus in corpora.items()
        },
        "trained_length": TRAINED,
        "position_edges": list(range(0, LENGTH + 1, BIN)),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "temperature": TEMPERATURE,
        "written_edges": list(SEEN_EDGES),
        "positions": positions,
        "writing": measure_writing(engine, prompts, human),
        **describe_provenance(),
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _short(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="elastic-mini", help="default: %(default)s")
    parser.add_argument("--novels", type=Path, help="folder with novels of the held-out authors")
    parser.add_argument("--out", type=Path, help="put the results into this .jsonl file")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        with Engine.from_pretrained(args.model) as engine:
            line = measure(engine, args.novels)
    except (ElasticMoEError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(json.dumps(line))
    tell(f"{time.monotonic() - began:.0f} s")
    if args.out:
        replace_lines(args.out, [line], "case")
        write_picture(line, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
