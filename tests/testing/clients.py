"""Five small clients: one right, four wrong in one way each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx2

from elastic_moe.testing import ElasticMoEServer

PAUSE_SECONDS = 0.05


class Failed(Exception):  # noqa: N818
    """No answer, and whether and when to ask again."""

    def __init__(self, what: object, *, again: bool, after_seconds: float = 0) -> None:
        super().__init__(f"no answer: {what}")
        self.again, self.after_seconds = again, after_seconds


class RightClient:
    """Streams an answer; asks again, a few times, where that may help."""

    attempts = 3

    def __init__(self, server: ElasticMoEServer) -> None:
        self._http = httpx2.Client(
            base_url=server.base_url,
            headers={"authorization": f"Bearer {server.api_key}"},
            trust_env=False,
        )

    def ask(self) -> str:
        for left in reversed(range(self.attempts)):
            try:
                return self._attempt()
            except Failed as failed:
                if not (left and failed.again):
                    raise
                time.sleep(max(PAUSE_SECONDS, failed.after_seconds))
        raise AssertionError

    def close(self) -> None:
        self._http.close()

    def _attempt(self) -> str:
        body = {"model": "elastic-mini", "prompt": "The", "max_tokens": 6, "stream": True}
        try:
            with self._http.stream("POST", "completions", json=body) as answer:
                if answer.status_code != 200:
                    raise self._failed(answer)
                return self._read(answer.iter_lines())
        except httpx2.TransportError as error:
            raise Failed(error, again=True) from error

    def _failed(self, answer: httpx2.Response) -> Failed:
        again = answer.status_code == 429 or answer.status_code >= 500
        seconds = float(answer.headers.get("retry-after", 0))
        return Failed(answer.status_code, again=again, after_seconds=seconds)

    def _read(self, lines: Iterator[str]) -> str:
        text = ""
        for line in lines:
            if line == "data: [DONE]":
                return text
            if line:
                text += self._text(line.removeprefix("data: "))
        raise Failed("the stream has no end", again=True)

    def _text(self, data: str) -> str:
        try:
            return json.loads(data)["choices"][0]["text"]
        except ValueError as error:
            raise Failed("an event is no JSON", again=True) from error


class NeverAgain(RightClient):
    """Does not ask again whatever happens."""

    attempts = 1


class AskingA400Again(RightClient):
    """Takes every failure for one that passes."""

    def _failed(self, answer: httpx2.Response) -> Failed:
        failed = super()._failed(answer)
        failed.again = True
        return failed


class Hasty(RightClient):
    """Does not wait as long as it is told to."""

    def _failed(self, answer: httpx2.Response) -> Failed:
        failed = super()._failed(answer)
        failed.after_seconds = 0
        return failed


class EasilyContent(RightClient):
    """Leaves out what it cannot read, and takes the end of the connection for that of the text."""

    def _read(self, lines: Iterator[str]) -> str:
        text = ""
        try:
            for line in lines:
                if line and line != "data: [DONE]":
                    text += self._text(line.removeprefix("data: "))
        except httpx2.TransportError:
            pass
        return text

    def _text(self, data: str) -> str:
        try:
            return super()._text(data)
        except Failed:
            return ""
