"""Models, tokens, health, and the description of it all."""

from __future__ import annotations

from typing import Any

from elastic_moe.engine import Engine
from tests.server.conftest import Running


def test_models_tell_names_limits_and_axes(served: Running) -> None:
    listed = served.openai.models.list().data
    assert [model.id for model in listed] == ["tiny", "ernie-5.1-prod"]
    card: Any = served.openai.models.retrieve("ernie-5.1-prod")
    shape = served.engine.shape
    assert (card.root, card.max_model_len) == ("tiny", served.engine.config.max_positions)
    assert card.elastic["max_depth"] == shape.num_layers
    assert card.elastic["max_top_k"] == shape.max_top_k
    assert card.elastic["num_experts"] == shape.num_experts
    assert card.elastic["width_granules"] == shape.width_granules
    assert served.http.get("/v1/models/gpt-4o").status_code == 404


def test_a_trained_model_tells_what_it_was_trained_for(mini: Engine) -> None:
    from elastic_moe.server.service import Service
    from elastic_moe.server.settings import ServerSettings

    trained = Service.of(mini, ServerSettings()).card("elastic-mini").elastic.trained
    assert trained["top_k"] == [1, 2, 3, 4]


def test_tokens_go_there_and_back(served: Running) -> None:
    text = "The \N{SNOWMAN} of"
    tokenizer = served.engine.tokenizer
    for special in (True, False):
        asked = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
        told = served.post("/tokenize", **asked).json()
        assert told["tokens"] == tokenizer.encode(text, add_special_tokens=special)
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
        assert told["max_model_len"] == served.engine.config.max_positions
    assert "bytes:\\xe2" in told["token_strs"]
    assert served.post("/detokenize", tokens=told["tokens"]).json() == {"prompt": text}
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
    told = served.http.get("/tokenizer_info").json()
    tokenizer = served.engine.tokenizer
    assert told["vocab_size"] == tokenizer.vocab_size
    assert told["eos_token_ids"] == sorted(tokenizer.eos_ids)
    assert (told["bos_token"], told["eos_token"]) == ("<|bos|>", "<|endoftext|>")  # as vLLM
    assert told["pad_token"] == "<|pad|>"
    assert tokenizer.chat_template is not None
    assert told["chat_template"] == tokenizer.chat_template.source


def test_health_and_readiness(served: Running) -> None:
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/ready").status_code == 200


def test_the_description_is_what_is_served(served: Running) -> None:
    told = served.http.get("/openapi.json").json()
    assert set(told["paths"]) >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
    }
    for path, operations in told["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            error = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert error["$ref"].endswith("/ErrorResponse")
    changes = told["paths"]["/admin/profiles/{name}"]["put"]["responses"]
    assert {"200", "201", "400", "409", "412"} <= set(changes)
    knobs = told["components"]["schemas"]["RoutingConfig"]
    assert {"top_k", "topK", "routingTopK", "activeLayers"} <= set(knobs["properties"])
    assert knobs["additionalProperties"] is False
