"""The smaller endpoints: models, tokens, health."""

from __future__ import annotations

from fastapi import FastAPI, Response

from elastic_moe import protocol
from elastic_moe.server.api.chat import template_messages
from elastic_moe.server.errors import ApiError
from elastic_moe.server.observe.exposition import CONTENT_TYPE, Exposition
from elastic_moe.server.service import Service


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add them."""
    engine = service.engine
    tokenizer, limit = engine.tokenizer, engine.config.max_positions

    @app.get("/v1/models")
    async def models() -> protocol.ModelList:
        """The names that requests may ask for."""
        return protocol.ModelList(data=[service.card(name) for name in service.names])

    @app.get("/v1/models/{model}")
    async def model(model: str) -> protocol.ModelCard:
        """One of them."""
        service.check_model(model)
        return service.card(model)

    @app.post("/tokenize")
    def tokenize(body: protocol.TokenizeRequest) -> protocol.TokenizeResponse:
        """Token ids of a prompt, or of messages as the model would read them."""
        service.check_model(body.model or engine.name)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "either prompt or messages must be given.", param="prompt")
        if body.messages is not None:
            ids = tokenizer.encode_chat(
                template_messages(body.messages), add_generation_prompt=body.add_generation_prompt
            )
        else:
            text = body.prompt or ""
            ids = tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
        return protocol.TokenizeResponse(
            count=len(ids),
            max_model_len=limit,
            tokens=ids,
            token_strs=(
                [service.logprobs.text(token) for token in ids] if body.return_token_strs else None
            ),
        )

    @app.post("/detokenize")
    def detokenize(body: protocol.DetokenizeRequest) -> protocol.DetokenizeResponse:
        """Text of token ids."""
        service.check_model(body.model or engine.name)
        for token in body.tokens:
            if token >= tokenizer.vocab_size:
                raise ApiError(
                    400,
                    f"tokens must be in [0, {tokenizer.vocab_size}), got {token}.",
                    param="tokens",
                )
        text = tokenizer.decode(body.tokens, skip_special_tokens=False)
        return protocol.DetokenizeResponse(prompt=text)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> protocol.TokenizerInfo:
        """What a client must know to make prompts itself."""
        template, ends = tokenizer.chat_template, sorted(tokenizer.eos_ids)

        def text(token_id: int | None) -> str | None:
            return None if token_id is None else tokenizer.fast.id_to_token(token_id)

        return protocol.TokenizerInfo(
            vocab_size=tokenizer.vocab_size,
            bos_token=text(tokenizer.bos_id),
            bos_token_id=tokenizer.bos_id,
            eos_token=text(ends[0] if ends else None),
            eos_token_ids=ends,
            pad_token=text(tokenizer.pad_id),
            pad_token_id=tokenizer.pad_id,
            chat_template=None if template is None else template.source,
        )

    exposition = Exposition(engine, service.metrics)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """What was counted, for Prometheus."""
        return Response(exposition.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        """200 as long as the engine lives."""
        engine.stats()
        return Response()

    @app.get("/ready", response_class=Response)
    async def ready() -> Response:
        """200 while requests are taken in."""
        if not service.ready:
            raise ApiError(503, "the server is ending.", code="not_ready")
        return Response()
