"""Conversations to tokens, and which of these tokens the assistant wrote.

A mask is right when it starts where generation starts and ends with the token that ends the turn: the module then
learns on exactly the positions where it will draft. Both places are found in the rendered text, by rendering it again
with the answer changed: the text is the same up to the answer and behind it.
"""

# T tokens of a conversation; masks are lists of T zeros and ones. A span: the first character, the one behind the last.

from __future__ import annotations

import json
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# characters of a private area of Unicode: no text has them, and no template knows what they are
CHANGED, FOLLOWING, OPENED, CLOSED = "\ue000", "\ue001", "\ue002", "\ue003"
FIRST_BLANK = 0xE100  # a shape's blanks are characters from here on
WORDS = ("content", "reasoning_content", "reasoning", "thinking")  # of a message, that a shape leaves blank
SHAPES = 1024  # that are remembered; conversations of a data set have some dozens


def chat_ids(messages: Messages, tokenizer: Any, *, add_generation_prompt: bool = False, **template: Any) -> list[int]:
    """Render a conversation with the tokenizer's chat template and return its token ids.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses this conversation.
    """
    text = ChatTemplate(tokenizer).text(messages, add_generation_prompt, **template)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def warn_merged() -> None:
    """Say, once, that a token spans the end of a prompt and the start of its answer."""
    # one constant text: Python shows equal warnings once, and the next thousand rows are likely the same
    warnings.warn(
        "The last tokens of a prompt merge with its answer: in training the prompt is encoded otherwise than when the "
        "target is asked. End prompts where a token ends, for example without a trailing space.",
        stacklevel=3,
    )


@dataclass(frozen=True)
class Shape:
    """A conversation whose words are blanks of one character: as the template shows it, and what is trained of it."""

    literals: list[str]  # before, between and behind the blanks
    blanks: list[str]
    missing: str  # what ends the last turn, where the template does not
    spans: list[Span]
    open_starts: list[tuple[int, str]]  # where an answer starts, unless this character stands there

    def filled(self, text: str, words: Mapping[str, str]) -> tuple[str, list[Span]] | None:
        """What `answers` returns, if the text is this shape with these words in its blanks."""
        at, place, places, grown = 0, 0, [], [0]  # in the text, in the shape; by how much all blanks so far are longer
        for literal, blank, following in zip(self.literals, [*self.blanks, ""], [*self.literals[1:], ""], strict=True):
            if not text.startswith(literal, at):
                return None
            at, place = at + len(literal), place + len(literal)
            if not blank:
                break
            word = words[blank]
            forms = (word, word.strip(), word.strip("\n"), word.lstrip("\n"))  # templates trim
            behind = (at + len(form) for form in forms if text.startswith(form + following, at))
            end = next(behind, None)
            if end is None:
                return None
            places.append(place)
            grown.append(grown[-1] + end - at - 1)
            at, place = end, place + 1
        if at != len(text):
            return None

        def moved(position: int) -> int:
            return position + grown[bisect_left(places, position)]

        text += self.missing
        if any(text.startswith(character, moved(position)) for position, character in self.open_starts):
            return None
        return text, [(moved(start), moved(end)) for start, end in self.spans]


class ChatTemplate:
    """A tokenizer's chat template, and where in its text the answers are.

    An answer starts behind what `add_generation_prompt` renders, and ends with the token that ends its turn, for some
    templates the next speaker's header. `{% generation %}` marks, where a template has them, choose among these tokens:
    what they leave out is not trained, and what is prompted or never generated is not trained though they hold it.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ends: dict[tuple, str] = {}  # what ends a turn, of each template that was met
        self._shapes: dict[str, Shape | None] = {}  # None: what is trained depends on the words
        added = tokenizer.added_tokens_decoder
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        self._special = _any_of(special)
        self._added = _any_of({token.content for token in added.values()} - special)

    def text(self, messages: Messages, add_generation_prompt: bool = False, **template: Any) -> str:
        """The rendered conversation.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses this conversation.
        """
        return self._render(self._accepted(messages, add_generation_prompt, template), add_generation_prompt, template)

    def answers(self, messages: Messages, first: int = 0, **template: Any) -> tuple[str, list[Span]]:
        """The rendered conversation, and the spans that the assistant wrote, of the answers from messages[first] on.

        Where nothing ends the last turn (GLM), the text goes on with the token that would. Conversations of a shape
        that was met before are rendered once, and their spans are the shape's; others are found `by_changes`.

        Raises:
            ValueError: an answer's place cannot be told, or the template refuses this conversation.
        """
        given = without_none(messages)
        blank, words = _blanked(given)
        if blank is not None:
            key = json.dumps([blank, first, template], sort_keys=True, default=str)
            if key not in self._shapes:
                if len(self._shapes) >= SHAPES:
                    self._shapes.clear()
                self._shapes[key] = self._shape(blank, first, template)
            shape = self._shapes[key]
            try:
                found = shape and shape.filled(self._render(given, False, template), words)
            except ValueError:
                found = None
            if found:
                return found
        return self.by_changes(given, first, **template)[:2]

    def _shape(self, blank: Messages, first: int, template: dict) -> Shape | None:
        try:
            text = self._render(blank, False, template)
            ended, spans, open_starts = self.by_changes(blank, first, **template)
        except ValueError:
            return None
        pieces = re.split(f"([{chr(FIRST_BLANK)}-{chr(FIRST_BLANK + len(WORDS) * len(blank))}])", text)
        return Shape(pieces[::2], pieces[1::2], ended[len(text) :], spans, open_starts)

    def by_changes(
        self, messages: Messages, first: int = 0, **template: Any
    ) -> tuple[str, list[Span], list[tuple[int, str]]]:
        """As `answers`, which it defines, and Shape.open_starts. Every answer is rendered again with other words."""
        messages = self._accepted(messages, False, template)
        open_starts: list[tuple[int, str]] = []
        text, marks = self._render(messages, False, template), self._marks(messages, template)
        spans, before = [], 0
        for turn in range(first, len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            if turn == 0:
                raise ValueError("messages[0]: got an assistant turn, wanted a question or a system message before it")
            behind = self._changing(text, messages, turn, template)[1]
            start = self._start(text, messages, turn, before, template, open_starts)
            # words beside a call may be shown behind what the tool said (Gemma-4)
            said = turn + 1 < len(messages) and bool(messages[turn].get("content") and messages[turn].get("tool_calls"))
            early = said and self._changing(text, messages, turn + 1, template)[0] < behind
            if early or not before <= start <= behind:
                raise ValueError(f"messages[{turn}]: the chat template shows this answer out of order; {_WANTED}")
            end, missing = self._end(text, messages, turn, behind, template)
            text, before = text + missing, behind
            for opened, closed in marks:
                # a mark that holds the answer's last character means the whole rest of the turn
                span = max(opened, start), end if closed >= behind else closed
                if opened <= behind and span[0] < span[1]:
                    spans.append(span)
            if not marks:
                spans.append((start, end))
        return text, spans, open_starts

    def start(self, text: str, messages: Messages, turn: int, **template: Any) -> int:
        """Where messages[turn] starts in the text of the whole conversation: behind what asks for it."""
        messages = self._accepted(messages, False, template)
        return self._start(text, messages, turn, 0, template, [])

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids of rendered texts, and where spans of tokens begin and what is behind each, in turn: all tokens of
        the texts' spans, those on a border too.
        """
        if not texts:
            return
        fast = self._tokenizer.is_fast
        more = {"return_offsets_mapping": True} if fast else {}
        encoded = self._tokenizer(list(texts), add_special_tokens=False, **more)
        for at, text in enumerate(texts):
            ids, found = list(encoded["input_ids"][at]), []
            for start, end in spans[at]:
                if fast:
                    offsets = encoded["offset_mapping"][at]
                    begin = bisect_right(offsets, start, key=itemgetter(1))
                    behind = bisect_left(offsets, end, lo=begin, key=itemgetter(0))
                    merged = begin < len(ids) and offsets[begin][0] < start
                else:
                    prompt = self._tokenizer(text[:start], add_special_tokens=False)["input_ids"]
                    begin = _shared(prompt, ids)
                    behind = _shared(self._tokenizer(text[:end], add_special_tokens=False)["input_ids"], ids)
                    merged = begin < len(prompt)
                if merged:
                    warn_merged()
                if found and begin <= found[-1]:
                    found[-1] = max(found[-1], behind)
                elif begin < behind:
                    found += [begin, behind]
            yield ids, found

    def _start(self, text: str, messages: Messages, turn: int, before: int, template: dict, opens: list) -> int:
        """Where an answer starts: behind what the template asks for it with. Shape.open_starts are added to opens."""
        try:
            context = messages[:turn]
            asked = self._render(context, True, template)
        except ValueError:  # a template may refuse conversations that are not whole
            context = [*self._leading(messages), {"role": "user", "content": FOLLOWING}]
            asked = self._render(context, True, template)
        if text.startswith(asked):
            return len(asked)
        # the context is rendered otherwise once more follows (reasoning is left out, instructions move), or the answer
        # opens otherwise than it was asked for: then it starts behind as much of what stands between the last message's
        # words and the answer as both share, which must be more than what closes that message
        header = len(asked) - _shared(self._render(context, False, template), asked)
        tail = asked[self._changing(asked, context, len(context) - 1, template, True)[1] :]
        before = max(before, self._changing(text, messages, turn - 1, template)[1])
        same = _shared(tail, text[before : before + len(tail)])
        if same < len(tail):
            opens.append((before + same, tail[same]))
        same = max((match.end() for match in self._pieces(tail) if match.end() <= same), default=0)
        if same < len(tail) and same <= len(tail) - header:
            raise ValueError(
                f"messages[{turn}]: the chat template asks for this answer with {tail[-60:]!r}, and nothing like it "
                f"stands before the answer in the whole conversation ({text[before : before + 60]!r}); {_WANTED}"
            )
        return before + same

    def _end(self, text: str, messages: Messages, turn: int, behind: int, template: dict) -> tuple[int, str]:
        """Where the turn ends whose answer ends at `behind`, and what has to be appended for that."""
        ender = self._ender(messages, turn, template)
        if ender and text.startswith(ender, behind):
            return behind + len(ender), ""
        last = turn + 1 == len(messages)
        rest = text[behind : None if last else self._changing(text, messages, turn + 1, template)[0]]
        if ender and ender in rest:
            return behind + rest.index(ender) + len(ender), ""
        found = self._first_end(rest, others=not ender)  # gpt-oss ends its last turn in another token
        if found is not None:
            return behind + found.end(), ""
        return (len(text) + len(ender), ender) if last else (behind, "")

    def _ender(self, messages: Messages, turn: int, template: dict) -> str:
        """The token that ends a turn like this one; an empty text where none does."""
        called = messages[turn].get("tool_calls")
        key = bool(called), self._source(template)
        if key not in self._ends:
            following: list[dict[str, Any]] = [{"role": "user", "content": FOLLOWING}]
            if called:
                call = called[-1]
                name = call.get("function", call).get("name")
                result = {"role": "tool", "name": name, "content": FOLLOWING, "tool_call_id": call.get("id")}
                following.insert(0, without_none(result))
            lead = [*self._leading(messages), {"role": "user", "content": "?"}, _changed(messages[turn])]
            ends = self._special.findall(_behind(CHANGED, self._render(lead, False, template)))
            going_on = ""
            for message in following:
                try:
                    going_on = self._render([*lead, message], False, template)
                    break
                except ValueError:  # it knows no tools
                    continue
            between = _behind(CHANGED, going_on).partition(FOLLOWING)[0]
            # what a turn closes with both as the last one and before another (Phi-3 ends the last one once more); where
            # there is nothing like that (GLM, gpt-oss), what stands first before the other
            both = [end for end in ends if end in between or not going_on]
            found = self._first_end(between)
            self._ends[key] = both[-1] if both else found[0] if found else ""
        return self._ends[key]

    def _first_end(self, text: str, others: bool = True) -> re.Match | None:
        """The token that ends an answer, in what stands between it and the next message's content."""
        eos = self._tokenizer.eos_token
        # other special tokens may close a call or a channel before the turn's own end
        found = (re.search(re.escape(eos), text) if eos else None) or self._special.search(text)
        return found or (self._added.search(text) if others else None)

    def _changing(self, text: str, messages: Messages, turn: int, template: dict, asked: bool = False) -> Span:
        """The part of the text that changes with what this message says; asked: the text ends with what asks."""
        other = self._render([*messages[:turn], _changed(messages[turn]), *messages[turn + 1 :]], asked, template)
        if text == other:
            raise ValueError(f"messages[{turn}]: the chat template does not show this message; {_WANTED}")
        start = _shared(text, other)
        return start, max(start, len(text) - _shared(text[::-1], other[::-1]))

    def _marks(self, messages: Messages, template: dict) -> list[Span]:
        """Spans of the text inside {% generation %} blocks."""
        source = self._source(template)
        if not GENERATION_TAG.search(source):
            return []
        # inside the block, and inside an {% if %}: whitespace is trimmed as it was around the tags alone
        marked = GENERATION_TAG.sub(_with_marker, source)
        spans, text, opened = [], "", 0
        pieces = re.split(f"([{OPENED}{CLOSED}])", self._render(messages, False, {**template, "chat_template": marked}))
        for piece in pieces:
            if piece == OPENED:
                opened = len(text)
            elif piece == CLOSED:
                spans.append((opened, len(text)))
            else:
                text += piece
        return spans

    def _pieces(self, text: str) -> Iterator[re.Match]:
        """Control tokens, lines and what is between them: the places at which a header can be cut."""
        return re.finditer(
            f"{self._special.pattern}|{self._added.pattern}|\n|((?!{self._special.pattern})[^\n])+", text
        )

    def _source(self, template: dict) -> str:
        return template.get("chat_template") or self._tokenizer.get_chat_template(None, template.get("tools"))

    @staticmethod
    def _leading(messages: Messages) -> list[Mapping[str, Any]]:
        return list(messages[:1]) if messages[0]["role"] in ("system", "developer") else []

    def _accepted(self, messages: Messages, add_generation_prompt: bool, template: dict) -> Messages:
        """The messages in the first form that the template takes: of calls' arguments, and of no content beside one."""
        first_error: ValueError | None = None
        forms = [without_none(messages)]
        if any(message.get("tool_calls") for message in forms[0]):
            filled = [{"content": "", **message} for message in forms[0]]
            forms += [_other_arguments(forms[0]), filled, _other_arguments(filled)]
        for form in forms:
            try:
                self._render(form, add_generation_prompt, template)
                return form
            except ValueError as error:
                first_error = first_error or error
        raise first_error  # type: ignore[misc]

    def _render(self, messages: Messages, add_generation_prompt: bool, template: dict) -> str:
        from jinja2.exceptions import TemplateError

        if not getattr(self._tokenizer, "chat_template", None) and "chat_template" not in template:
            raise ValueError(
                "got a conversation, but the tokenizer has no chat template. Set tokenizer.chat_template, or use rows "
                "of 'text' or of 'prompt' and 'completion' strings"
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template
            )
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error


_WANTED = (
    "wanted a template that shows answers as it asks for them: one with {% generation %} marks (--chat-template), or "
    "rows whose 'prompt' and 'completion' are strings"
)


def without_none(value: Any) -> Any:
    """Without the keys that hold None: Arrow fills them into every row, inside messages, calls and tools too."""
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _blanked(messages: Messages) -> tuple[list[dict[str, Any]] | None, dict[str, str]]:
    """The messages with a character in place of each text, and the texts; None where there is more than text."""
    blank, words = [], {}
    for message in messages:
        if not all(isinstance(value, str) and (name in WORDS or name == "role") for name, value in message.items()):
            return None, {}
        blank.append(dict(message))
        for number, name in enumerate(WORDS, start=FIRST_BLANK + len(WORDS) * (len(blank) - 1)):
            if name in message:
                blank[-1][name] = chr(number)
                words[chr(number)] = message[name]
    return (blank if len(messages) * len(WORDS) < 0xF8FF - FIRST_BLANK else None), words


def _behind(character: str, text: str) -> str:
    return text.rpartition(character)[2]


def _changed(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with other words: another content, other arguments of its calls."""
    changed = dict(message)
    if message.get("content") or not message.get("tool_calls"):
        changed["content"] = CHANGED
    if message.get("tool_calls"):
        changed["tool_calls"] = _with_arguments(
            message["tool_calls"],
            lambda given: json.dumps({CHANGED: CHANGED}, ensure_ascii=False) if isinstance(given, str)
            else {CHANGED: CHANGED},
        )  # fmt: skip
    return changed


def _with_arguments(calls: Sequence[Mapping[str, Any]], change: Any) -> list[dict[str, Any]]:
    made = []
    for call in calls:
        inner = call.get("function", call)
        inner = {**inner, "arguments": change(inner.get("arguments", {}))}
        made.append({**call, "function": inner} if "function" in call else inner)
    return made


def _other_arguments(messages: Messages) -> list[dict[str, Any]]:
    """Arguments of calls as JSON text where they are mappings, and the other way round: templates take one or both."""

    def other(given: Any) -> Any:
        try:
            return json.loads(given) if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        except json.JSONDecodeError:
            return given

    return [
        {**message, "tool_calls": _with_arguments(message["tool_calls"], other)}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _with_marker(tag: re.Match) -> str:
    before, end, after = tag.groups()
    if end:
        return f'{{%{before} if true %}}{{{{ "{CLOSED}" }}}}{{% endif %}}{{% endgeneration {after}%}}'
    return f'{{%{before} generation %}}{{% if true %}}{{{{ "{OPENED}" }}}}{{% endif {after}%}}'


def _any_of(words: set[str]) -> re.Pattern:
    """A pattern of any of these words, the longest first; with none it matches nowhere."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")


def _shared(one: Sequence, other: Sequence) -> int:
    """Number of leading items that both have in common."""
    count = min(len(one), len(other))
    # by halves: slices are compared at C's speed, items in a loop are not
    return bisect_left(range(1, count + 1), True, key=lambda length: one[:length] != other[:length])
