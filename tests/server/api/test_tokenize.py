"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from typing import Any

from tests.server.conftest import Running


def test_tokens_go_there_and_back(served: Running) -> None:
    text = "The \N{SNOWMAN} of"
    tokenizer = served.engine.tokenizer
    for special in (True, False):
        asked = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
        reported = served.post("/tokenize", **asked).json()
        assert reported["tokens"] == tokenizer.encode(text, add_special_tokens=special)
        assert reported["count"] == len(reported["tokens"]) == len(reported["token_strs"])
        assert reported["max_model_len"] == served.engine.config.max_positions
    assert "bytes:\\xe2" in reported["token_strs"]
    assert served.post("/detokenize", tokens=reported["tokens"]).json() == {"prompt": text}
    whole = tokenizer.encode(text)
    assert served.post("/detokenize", tokens=whole).json()["prompt"] == tokenizer.decode(
        whole, skip_special_tokens=False
    )
    messages = [{"role": "user", "content": "hi"}]
    for begin in (True, False):
        asked = {"messages": messages, "add_generation_prompt": begin}
        want = tokenizer.encode_chat(messages, add_generation_prompt=begin)
        assert served.post("/tokenize", **asked).json()["tokens"] == want


def test_what_has_no_tokens(served: Running) -> None:
    def refused(path: str, status: int = 400, **body: Any) -> str:
        return served.refused(status, path, **{"model": ..., "prompt": ..., **body})["message"]

    assert "either prompt or messages" in refused("/tokenize")
    assert "either" in refused("/tokenize", prompt="x", messages=[{"role": "user", "content": "x"}])
    assert "must be in [0, 4096), got 4096" in refused("/detokenize", tokens=[4096])
    assert "tokens" in refused("/detokenize", tokens=[-1])
    assert "does not exist" in refused("/tokenize", 404, model="gpt", prompt="x")


def test_the_tokenizer_is_told(served: Running) -> None:
    reported = served.http.get("/tokenizer_info").json()
    tokenizer = served.engine.tokenizer
    assert reported["vocab_size"] == tokenizer.vocab_size
    assert reported["eos_token_ids"] == sorted(tokenizer.eos_ids)
    assert (reported["bos_token"], reported["eos_token"]) == ("<|bos|>", "<|endoftext|>")  # as vLLM
    assert reported["pad_token"] == "<|pad|>"
    assert tokenizer.chat_template is not None
    assert reported["chat_template"] == tokenizer.chat_template.source
