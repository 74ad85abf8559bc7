"""POST /v1/responses: OpenAI's newer form of a chat, on the same service. Nothing is kept between two requests."""
