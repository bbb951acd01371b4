"""What clients may say, checked: OpenAI's fields, some of vLLM's, and ours. A field that is not here is an error that
names it; nothing is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from foretell.config import nearest
from foretell.decoding.policies import POLICIES
from foretell.serving.requests import MOST_LOGPROBS

MOST_CHOICES = 16  # n
MOST_PROMPTS = 32  # of one completion
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_BIASES = 1024
# values that ask for nothing: as good as absent, for the sake of clients that send all they know
NOTHING: dict[str, Any] = {
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "tool_calls": [],
    "annotations": [],
    "echo": False,
    "best_of": 1,
    "store": False,
}


class Wire(BaseModel):
    """One JSON object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None and not (k in NOTHING and v == NOTHING[k])}


def _whole(text: str) -> str:
    """JSON can hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("wanted whole characters, not one half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


def _by_id(biases: Any) -> Any:
    if isinstance(biases, dict) and all(isinstance(k, int) or re.fullmatch(r"\d{1,9}", k) for k in biases):
        return {int(token): bias for token, bias in biases.items()}
    raise ValueError("wanted an object of token ids and numbers")


def _prompts(prompt: Any) -> Any:
    """A text, ids, or a list of either, as a list."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(x) is int for x in prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not 1 <= len(prompt) <= MOST_PROMPTS:
        raise ValueError(f"wanted a text, token ids, or a list of 1 to {MOST_PROMPTS} of these")
    for one in prompt:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(x) is int for x in one)):
            raise ValueError("wanted texts or lists of token ids")
        if not one:
            raise ValueError("got an empty prompt, wanted at least one token")
        if isinstance(one, str):
            _whole(one)
    return prompt


def _drafts(number: Any) -> Any:
    if number == "auto" or (type(number) is int and number >= 0):
        return number
    raise ValueError("wanted a number of at least 0, or auto")


class Part(Wire):
    """Of a message."""

    type: Literal["text"]
    text: Text


class Message(Wire):
    """Of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """As chat templates read it; OpenAI's new name of the system is the system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class StreamOptions(Wire):
    """Of a stream."""

    include_usage: bool = False


class Sampling(Wire):
    """What chats and completions share. None: as the model's own generation config says."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_by_id), Field(max_length=MOST_BIASES)
    ] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
        BeforeValidator(_listed),
        Field(max_length=MOST_STOPS),
    ] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MOST_BIASES)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # ours
    num_draft_tokens: Annotated[Any, BeforeValidator(_drafts)] = None
    policy: Literal[tuple(POLICIES)] | None = None  # type: ignore[valid-type]
    confidence_threshold: float | None = None
    return_trace: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: got some without stream, which they are of")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _fits_chat(self) -> Any:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: got a number without logprobs, which it is of")
        if None not in (both := (self.max_tokens, self.max_completion_tokens)) and both[0] != both[1]:
            raise ValueError(f"max_tokens: got {both[0]} beside max_completion_tokens {both[1]}, wanted one of them")
        return self

    def most_tokens(self, room: int) -> int | None:
        """Of an answer, where the context has room for so many; None: all of it."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def scored(self) -> int | None:
        """Likeliest tokens that are told at each place; None: no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def most_tokens(self, room: int) -> int | None:
        """As ChatRequest's: OpenAI's default is 16, as far as they fit."""
        return self.max_tokens or min(16, room)

    @property
    def scored(self) -> int | None:
        """As ChatRequest's."""
        return self.logprobs


class TokenizeRequest(Wire):
    """POST /tokenize: a text, or a conversation as the model would read it."""

    model: str | None = None
    prompt: Text | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Any:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: wanted a prompt or messages, one of them")
        if self.messages is not None and self.add_special_tokens and "add_special_tokens" in self.model_fields_set:
            raise ValueError("add_special_tokens: got true with messages, whose special tokens are the chat template's")
        return self


def told(errors: Sequence[Any]) -> tuple[str, str | None]:
    """(what is wrong with a request, the first field that it is about) of pydantic's list."""
    said, first = [], None
    for error in errors[:10]:
        words = [str(word) if isinstance(word, int) else word for word in error["loc"][1:]]
        name = re.sub(r"\.(\d+)", r"[\1]", ".".join(words))
        got, what = repr(error.get("input")), error["msg"].removeprefix("Value error, ")
        got = got if len(got) <= 80 else got[:80] + "..."
        if error["type"] == "json_invalid":
            name, text = None, f"body: got no JSON ({error['ctx']['error']} at {error['loc'][-1]})."
        elif error["type"] == "extra_forbidden":
            known = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {words[-1]}  # at the other endpoint
            text = f"{name}: not supported here{nearest(words[-1], known)}. Nothing is ignored: leave it out."
        elif error["type"] == "missing":
            text = f"{name or 'body'}: got nothing, wanted it."
        elif not name and error["type"] == "value_error":  # of several fields: it names them itself
            name, text = what.partition(":")[0], what + "."
        elif not name:
            text = "body: wanted a JSON object, sent with Content-Type: application/json."
        else:
            text = f"{name}: got {got}; {what[:1].lower() + what[1:]}."
        said.append(text)
        first = first or name or None
    return " ".join(said), first
