"""A language model behind a chat endpoint that speaks OpenAI's protocol: OpenAI's own, or any server that does the same."""

from __future__ import annotations

import os
from typing import Any

from limbeck.errors import BadInput, LimbeckError


class Chat:
    """Asks a chat endpoint.

    model: its name at the endpoint. base_url: of the endpoint, e.g. http://localhost:8000/v1; None: OpenAI's. key_variable: the
    environment variable that holds the key; it is read nowhere else, and never written or shown. A server at ``base_url`` may need
    none. temperature: None leaves it to the endpoint. timeout: seconds to wait for an answer. retries: after a lost connection, a limit
    reached or a fault of the server, with growing pauses.
    Raises `BadInput` where the package ``openai`` or OpenAI's key is missing.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        temperature: float | None = None,
        timeout: float = 600.0,
        retries: int = 4,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise BadInput("asking a chat endpoint needs the package openai: pip install 'limbeck[synth]'") from error
        key = os.environ.get(key_variable, "")
        if not key and base_url is None:
            raise BadInput(f"the environment variable {key_variable} holds no key: set it, or name another server's base_url")
        self.model, self.temperature = model, temperature
        self.place = base_url or "api.openai.com"
        self._key, self._failure = key, openai.OpenAIError
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=base_url or "https://api.openai.com/v1", timeout=timeout, max_retries=retries
        )

    def __repr__(self) -> str:
        return f"Chat({self.model!r} at {self.place})"

    def ask(self, prompt: str) -> str:
        """The answer to one message. Raises `LimbeckError`, in one line, where the endpoint fails or answers nothing."""
        options: dict[str, Any] = {} if self.temperature is None else {"temperature": self.temperature}
        try:
            reply = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], **options
            )
            choices = getattr(reply, "choices", None)  # of another protocol, a reply may be anything
        except self._failure as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            if self._key:
                said = said.replace(self._key, "***")
            raise LimbeckError(f"{self} failed: {said}") from None  # what it came from may hold the key
        text = choices[0].message.content if choices else None
        if not text or not text.strip():
            raise LimbeckError(f"{self} answered nothing")
        return str(text)
