"""Batches of a stream depend on their number alone; a tokenizer has what training needs."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_moe.errors import CorpusError
from elastic_moe.train.text.tokens import (
    END,
    IM_END,
    SPECIAL_TOKENS,
    TokenStream,
    check_tokenizer,
    special_id,
    train_tokenizer,
)

TEXT = "It was the best of times, it was the worst of times. " * 20


def test_batches_cover_an_epoch_once_and_predict_the_next_token() -> None:
    tokens = np.arange(10 * 512 + 17, dtype=np.uint16)
    stream = TokenStream(tokens, bos=60000, seed=3)
    seen = []
    for first in range(0, 10, 2):
        inputs, targets = stream.batch(first, 2, 256)
        assert inputs.shape == targets.shape == (4, 256)
        assert (inputs[:, 0] == 60000).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        seen += targets.flatten().tolist()
    assert sorted(seen) == list(range(10 * 512))
    again, _ = TokenStream(tokens, bos=60000, seed=3).batch(4, 2, 256)
    assert (again == stream.batch(4, 2, 256)[0]).all()
    second_epoch = stream.batch(10, 10, 512)[1]
    assert sorted(second_epoch.flatten().tolist()) == sorted(seen)
    assert second_epoch.flatten().tolist() != seen
    resumed = TokenStream(tokens, bos=60000, seed=3).batch(10, 10, 512)[1]
    assert (resumed == second_epoch).all()


def test_words_keep_the_mark_before_them() -> None:
    tokenizer = train_tokenizer(["(foo (foo (foo " * 50], 300)
    assert tokenizer.encode("(foo", add_special_tokens=False).tokens == ["(foo"]


def test_a_tokenizer_must_fit_the_model_and_the_stream() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    assert special_id(tokenizer, END) != special_id(tokenizer, IM_END)
    size = tokenizer.get_vocab_size()
    check_tokenizer(tokenizer, size)
    with pytest.raises(CorpusError, match=rf"ids up to {size - 1}, but .* allow {size - 2}\."):
        check_tokenizer(tokenizer, size - 1)
    with pytest.raises(CorpusError, match=r"no token '<\|nope\|>'"):
        special_id(tokenizer, "<|nope|>")
    tokenizer.add_tokens([f"word{n}" for n in range(2**16)])
    with pytest.raises(CorpusError, match="16 bits allow 65535"):
        check_tokenizer(tokenizer, 2**17)


def test_a_tokenizer_without_the_tokens_of_the_template_is_refused_at_the_start() -> None:
    from tokenizers import Tokenizer

    text = train_tokenizer([TEXT], 300).to_str().replace("<|im_end|>", "<|im_stop|>")
    with pytest.raises(CorpusError, match=r"no token '<\|im_end\|>'"):
        check_tokenizer(Tokenizer.from_str(text), 300)
    assert "<|im_end|>" in SPECIAL_TOKENS
