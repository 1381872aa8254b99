"""From text to tokens and from a stream of tokens to batches."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from elastic_moe.errors import CorpusError

BOS, END, PAD = "<|bos|>", "<|endoftext|>", "<|pad|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    BOS,
    END,
    PAD,
    IM_START,
    IM_END,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    *(f"<|reserved_{i}|>" for i in range(16)),
)
# Words with their leading space, runs of up to three digits, punctuation, line ends, indentation.
SPLIT = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text round-trips; ids of `SPECIAL_TOKENS` come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = special_id(tokenizer, BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token.

    Raises:
        CorpusError: the tokenizer lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CorpusError(f"the tokenizer has no token {token!r}. Train one with this package.")
    return found


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that the model or the stream cannot hold, before hours go into a run.

    Raises:
        CorpusError: an id is past the vocabulary or 16 bits, or a special token is missing.
    """
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    limit = min(vocab_size, 2**16)  # streams are stored as uint16
    if largest >= limit:
        raise CorpusError(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary and 16 bits allow "
            f"{limit - 1}. Use a tokenizer of at most {limit} tokens."
        )
    for token in (BOS, END, PAD, IM_START, IM_END):
        special_id(tokenizer, token)


def chat_text(question: str, answer: str) -> str:
    """One exchange as the chat template writes it, without the final end-of-document token."""
    return f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"


class TokenStream:
    """Batches of fixed pieces of a token stream, each epoch in its own seeded order.

    Position is one number: pieces consumed. A piece is `piece_tokens` inputs; sequences shorter
    than a piece are its consecutive parts. Every sequence starts with BOS, then predicts
    its own tokens: inputs are BOS, t0 .. t(n-2), targets t0 .. t(n-1).

    `source` identifies the tokens, such as the sha256 of their manifest: a run that is resumed
    must read the same.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        bos: int,
        seed: int,
        piece_tokens: int = 512,
        source: str = "",
    ) -> None:
        if len(tokens) < piece_tokens:
            raise CorpusError(
                f"the stream has {len(tokens)} tokens, a piece needs {piece_tokens}. Add text."
            )
        self.tokens = tokens
        self.source = source
        self.bos = bos
        self.seed = seed
        self.piece_tokens = piece_tokens
        self.pieces_per_epoch = len(tokens) // piece_tokens
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def batch(
        self, first_piece: int, num_pieces: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (num_pieces * piece_tokens / length, length)."""
        targets = np.stack([self._piece(first_piece + i) for i in range(num_pieces)])
        targets = targets.reshape(-1, length).astype(np.int64)
        inputs = np.concatenate(
            [np.full((len(targets), 1), self.bos, dtype=np.int64), targets[:, :-1]], axis=1
        )
        return inputs, targets

    def _piece(self, index: int) -> np.ndarray:
        epoch, within = divmod(index, self.pieces_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(
                self.pieces_per_epoch
            )
            self._epoch = epoch
        start = int(self._order[within]) * self.piece_tokens
        return self.tokens[start : start + self.piece_tokens]
