"""Vectors through OpenAI's own client."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from elastic_moe.engine.running.runner import Chunk
from tests.server.conftest import Running


def expected(served: Running, ids: list[int], name: str) -> torch.Tensor:
    """From the residual stream after the last layer, in one step."""
    runner = served.engine.runner
    subnet = served.engine.resolve(name)
    last = len(subnet.layers)
    out = runner.run([Chunk(runner.open(subnet, len(ids)), ids, "none")], states_after=[last])
    x = torch.from_numpy(out.states[last])
    normed = x / (x.pow(2).mean(-1, keepdim=True) + served.engine.config.rms_norm_eps).sqrt()
    mean = (normed * final_norm(served)).double().mean(0)
    return (mean / mean.norm()).float()


def final_norm(served: Running) -> torch.Tensor:
    from elastic_moe.model.reference.loading import load_model

    return load_model(served.engine.folder, dtype="float32").norm.weight.detach()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_vector_is_the_normalised_mean_of_the_final_states(
    served: Running, encoding: str
) -> None:
    texts = ["The with statement", "def", "A set is a set."]
    ids = [served.engine.encode(text) for text in texts]
    for inputs in (texts, ids):
        done = served.openai.embeddings.create(
            model="tiny@L3-k2",
            input=inputs,
            encoding_format=encoding,  # type: ignore[arg-type]
        )
        assert done.usage.prompt_tokens == sum(map(len, ids)) == done.usage.total_tokens
        assert done.routing["name"] == "L3-k2"  # type: ignore[attr-defined]
        for i, item in enumerate(done.data):
            assert item.index == i
            vector = item.embedding
            if isinstance(vector, str):
                vector = torch.frombuffer(bytearray(base64.b64decode(vector)), dtype=torch.float32)
            got = torch.as_tensor(vector)
            assert float(got.norm()) == pytest.approx(1, abs=1e-5)
            assert torch.allclose(got, expected(served, ids[i], "L3-k2"), atol=1e-5)


def test_a_long_text_is_read_in_chunks_and_gives_the_same(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_moe.engine import scoring

    ids = list(range(5, 205))
    whole = served.engine.embed(ids, "k2")
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 33)
    chunked = served.engine.embed(ids, "k2")
    assert np.allclose(whole.vector, chunked.vector, atol=1e-6)
    assert np.allclose(whole.vector, expected(served, ids, "k2"), atol=1e-5)
    assert whole.routing == chunked.routing
    assert whole.routing.mean_experts == 2
    assert whole.prompt_tokens == 200


def test_what_has_no_vector(served: Running) -> None:
    def refused(**body: object) -> dict[str, str]:
        asked = {"input": "x", **body}
        return served.refused(400, "/v1/embeddings", **asked)

    hidden = served.engine.config.hidden_size
    answer = served.post("/v1/embeddings", model="tiny", input="x", dimensions=hidden)
    assert len(answer.json()["data"][0]["embedding"]) == hidden
    assert f"must be {hidden}" in refused(dimensions=hidden - 1)["message"]
    assert refused(encoding_format="hex")["param"] == "encoding_format"
    assert refused(input=[])["param"] == "input"
    assert refused(input=["word " * 2000])["code"] == "context_length_exceeded"
    assert "at most 1024" in refused(input=["a"] * 1025)["message"]
