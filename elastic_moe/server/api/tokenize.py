"""POST /tokenize and /detokenize, GET /tokenizer_info, as in vLLM."""

from __future__ import annotations

from fastapi import FastAPI

from elastic_moe.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from elastic_moe.server.api.chat import template_messages
from elastic_moe.server.errors import ApiError
from elastic_moe.server.service import Service


def add_endpoints(app: FastAPI, service: Service) -> None:
    """Add the endpoints of this module to the application."""
    engine = service.engine
    tokenizer, limit = engine.tokenizer, engine.config.max_positions

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> TokenizeResponse:
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
        token_text = service.logprobs.token_text
        return TokenizeResponse(
            count=len(ids),
            max_model_len=limit,
            tokens=ids,
            token_strs=[token_text(token) for token in ids] if body.return_token_strs else None,
        )

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
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
        return DetokenizeResponse(prompt=text)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> TokenizerInfo:
        """Special tokens and chat template, for clients that build prompts themselves."""
        template, eos_ids = tokenizer.chat_template, sorted(tokenizer.eos_ids)

        def text(token_id: int | None) -> str | None:
            return None if token_id is None else tokenizer.fast.id_to_token(token_id)

        return TokenizerInfo(
            vocab_size=tokenizer.vocab_size,
            bos_token=text(tokenizer.bos_id),
            bos_token_id=tokenizer.bos_id,
            eos_token=text(eos_ids[0] if eos_ids else None),
            eos_token_ids=eos_ids,
            pad_token=text(tokenizer.pad_id),
            pad_token_id=tokenizer.pad_id,
            chat_template=None if template is None else template.source,
        )
