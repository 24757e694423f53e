"""The command line's offline side: `LLM` with the face of `client.Client`."""

from __future__ import annotations

from collections.abc import Callable, Generator

from photon_grpc.client import Ending, Request
from photon_grpc.frontend.events import Delta, Finished, Summary
from photon_grpc.llm import LLM, GenerationParams
from photon_grpc.options import Options
from photon_grpc.types import ChatInput, ChatMessage, Finish, Prompt, Role

__all__ = ["OfflineSource"]


class OfflineSource:
    """A model in this process. Raises StartupError when it cannot be loaded."""

    def __init__(self, options: Options, progress: Callable[[int, int], None] | None = None) -> None:
        self._llm = LLM(options.model.path, options=options, progress=progress)

    def close(self) -> None:
        """Give memory and threads back."""
        self._llm.close()

    def stream(self, request: Request) -> Generator[str | Ending]:
        """Text as it is generated, then one Ending. Closing the iterator ends the request.

        Raises RequestError and the other errors of a request.
        """
        prompt: Prompt = request.text
        if request.messages:
            messages = (ChatMessage(Role(role), content) for role, content in request.messages)
            prompt = ChatInput(tuple(messages))
        params = GenerationParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop=request.stop,
            ignore_eos=request.ignore_eos,
        )
        reason = ""
        for event in self._llm.stream(prompt, params):
            match event:
                case Delta(text=text) if text:
                    yield text
                case Finished(finish=finish):
                    reason = _finish_name(finish)
                case Summary(usage=usage, timings=timings):
                    yield Ending(
                        finish_reason=reason,
                        prompt_tokens=usage.prompt_tokens,
                        cached_prompt_tokens=usage.cached_prompt_tokens,
                        output_tokens=usage.output_tokens,
                        first_token_s=timings.first_token,
                        decode_s=timings.decode,
                        total_s=timings.total,
                    )
                case _:
                    continue


def _finish_name(finish: Finish) -> str:
    name = finish.reason.name
    return f"{name} {finish.stop_string!r}" if finish.stop_string is not None else name
