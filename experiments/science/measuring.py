"""The texts that a quality number is measured on, and a pass over all sub-networks of a list."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.engine import Engine
from elastic_moe.errors import CorpusError
from elastic_moe.lab.sweeps.quality import FullNetwork, Quality, measure_depths, paired_difference
from elastic_moe.lab.sweeps.text import Corpus, EvaluationSet, evaluation_set, language_reference
from elastic_moe.model.text.tokenizer import Tokenizer
from experiments.elastic_mini.recipe import HELD_OUT_AUTHORS

REFERENCE, AUTHORS = "python-language-reference", "held-out-authors"
EXCERPT_START, EXCERPT_CHARACTERS = 20_000, 12_000  # past prefaces and lists of contents
TOKENS = 32_256  # scored of each text: 125 windows

# A name and the depths to read off in one pass over it; the full network first.
Bundles = Mapping[str, Sequence[int]]


def excerpts(folder: Path) -> dict[str, str]:
    """The same stretch of every novel of a held-out author: file name -> text.

    Raises:
        CorpusError: an author is missing from the folder, or a novel is too short or not UTF-8.
    """
    found: dict[str, str] = {}
    for author in HELD_OUT_AUTHORS:
        novels = sorted(folder.glob(f"{author}_*.txt"))
        if not novels:
            raise CorpusError(
                f"{folder} has no {author}_*.txt. Name the folder of novels that the held-out "
                f"authors ({', '.join(HELD_OUT_AUTHORS)}) are in."
            )
        for path in novels:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path} is not UTF-8: {error.reason} at byte {error.start:,}. Convert it, or "
                    f"fetch it again."
                ) from None
            end = EXCERPT_START + EXCERPT_CHARACTERS
            if len(text) < end:
                raise CorpusError(
                    f"{path} has {len(text):,} characters; the excerpt ends at {end:,}."
                )
            found[path.name] = text[EXCERPT_START:end]
    return found


def held_out_authors(folder: Path) -> Corpus:
    """The excerpts joined, in the order of the authors' names."""
    return Corpus(AUTHORS, "\n\n".join(excerpts(folder).values()))


def evaluation_texts(
    tokenizer: Tokenizer, novels: Path | None, tokens: int = TOKENS
) -> dict[str, EvaluationSet]:
    """The language reference, and the held-out authors where their folder is named.

    Raises:
        CorpusError: a text has fewer tokens than are to be scored.
    """
    corpora = [language_reference(), *([held_out_authors(novels)] if novels else [])]
    texts = {corpus.name: evaluation_set(corpus, tokenizer, tokens) for corpus in corpora}
    for name, text in texts.items():
        if text.scored_tokens < tokens - tokens % 256:
            raise CorpusError(
                f"{name} gives {text.scored_tokens:,} tokens to score, {tokens:,} are needed."
            )
    return texts


def measure(engine: Engine, text: EvaluationSet, bundles: Bundles) -> dict[str, Quality]:
    """Quality of every sub-network of the bundles; distances are to the first one of the first."""
    whole = FullNetwork(text.scored_tokens, engine.config.vocab_size)
    found: dict[str, Quality] = {}
    for name, depths in bundles.items():
        deepest = engine.resolve(name)
        measured: dict[int, Quality] = {}
        for _, measured in measure_depths(  # noqa: B007  (the last item is the result)
            engine.runner, text, deepest, depths, whole, is_full=not found
        ):
            pass
        found |= {deepest.at_depth(depth).name: quality for depth, quality in measured.items()}
        names = ", ".join(deepest.at_depth(depth).name for depth in depths)
        print(f"{text.corpus.name}: measured {names}", file=sys.stderr)
    return found


def describe_quality(quality: Quality, text: EvaluationSet) -> dict[str, Any]:
    """What a sub-network does by itself."""
    return {
        "nats_per_token": round(quality.nats_per_token, 5),
        "bits_per_byte": round(quality.bits_per_byte(text.scored_bytes), 5),
    }


def describe_loss(quality: Quality, full: Quality, text: EvaluationSet) -> dict[str, Any]:
    """What it loses against the full network; the standard error is paired, over windows."""
    loss, error = paired_difference(quality, full, text)
    return {
        "nats_lost": round(loss, 5),
        "standard_error": None if error is None else round(error, 5),
        "kl_to_full": round(quality.kl_to_full, 5),
        "top1_agreement": round(quality.top1_agreement, 5),
    }
