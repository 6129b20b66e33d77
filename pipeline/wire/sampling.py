"""How to choose tokens and when to stop."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from pipeline.wire.errors import RequestError, shown

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 300
MAX_BANS = 128  # words that must not come
MAX_BAN_LENGTH = 64  # tokens of one
MAX_ALLOWED = 4096  # token ids
MAX_LOGPROBS = 20
MAX_SEED = 2**63
MAX_INT32 = 2**31
MAX_CHOICES = 16
MAX_THINKING_END = 16  # tokens of the tag that ends a thought
MAX_GRAMMAR_BYTES = 256 << 10  # of a grammar's source, in UTF-8
MAX_GRAMMAR_CHOICES = 1024


class NumberRange(NamedTuple):
    least: float
    most: float
    words: str  # for errors

    def has(self, value: float) -> bool:
        return self.least <= value <= self.most  # NaN is in no range


RANGES: Mapping[str, NumberRange] = {
    "temperature": NumberRange(0, 100, "between 0 and 100"),
    "top_p": NumberRange(0, 1, "above 0 and at most 1"),
    "top_k": NumberRange(-1, MAX_INT32 - 1, "-1 (no limit) or more"),
    "seed": NumberRange(0, MAX_SEED - 1, "between 0 and 2**63 - 1"),
    "min_p": NumberRange(0, 1, "between 0 and 1"),
    "presence_penalty": NumberRange(-2, 2, "between -2 and 2"),
    "frequency_penalty": NumberRange(-2, 2, "between -2 and 2"),
    "repetition_penalty": NumberRange(0.01, 100, "between 0.01 and 100"),
    "max_tokens": NumberRange(0, MAX_INT32 - 1, "at least 0"),
    "min_tokens": NumberRange(0, MAX_INT32 - 1, "at least 0 and at most max_tokens"),
    "n": NumberRange(1, MAX_CHOICES, f"between 1 and {MAX_CHOICES}"),
    "logprobs": NumberRange(0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "prompt_logprobs": NumberRange(0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "thinking_budget": NumberRange(0, MAX_INT32 - 1, "0 or more"),
}
BIASES = NumberRange(-100, 100, "between -100 and 100")  # of `logit_bias`


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token, or a stop string found by the client library
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # the client or its connection went away


class GrammarKind(enum.StrEnum):
    JSON_OBJECT = "json_object"  # any JSON object; the source is empty
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the whole answer
    CHOICE = "choice"  # a JSON list of strings: the answer is one of them
    EBNF = "ebnf"  # in GBNF's notation, with a rule named root
    STRUCTURAL_TAG = "structural_tag"  # xgrammar's JSON


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an answer must be. See docs/structured-output.md.

    `field` is the name that the client gave to the grammar, for errors. Raises RequestError, naming it, where
    the source is too long or obviously wrong: preprocess compiles the grammar and says the rest.
    """

    kind: GrammarKind
    source: str = ""
    field: str = "response_format"

    def __post_init__(self) -> None:
        num_bytes = len(self.source.encode(errors="surrogatepass"))
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise self.error(f"the grammar has {num_bytes} bytes, the limit is {MAX_GRAMMAR_BYTES}")
        if self.kind is GrammarKind.JSON_OBJECT and self.source:
            raise self.error("a grammar of the kind json_object has no source")
        if self.kind is GrammarKind.CHOICE:
            self.choices()

    def choices(self) -> list[str]:
        """The strings of a grammar of the kind choice."""
        try:
            found = msgspec.json.decode(self.source, type=list[str])
        except (msgspec.MsgspecError, UnicodeError):
            raise self.error("choices must be a JSON list of strings") from None
        if not 1 <= len(found) <= MAX_GRAMMAR_CHOICES or not all(found):
            raise self.error(f"choices must be 1 to {MAX_GRAMMAR_CHOICES} strings that are not empty")
        return found

    @property
    def digest(self) -> bytes:
        """Tells one grammar from another, whoever gave it."""
        source = self.source.encode(errors="surrogatepass")
        return hashlib.blake2b(f"{self.kind}:".encode() + source, digest_size=16).digest()

    def error(self, message: str) -> RequestError:
        return RequestError(message, field=self.field)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling of one request. `temperature` 0 is greedy; `top_k` 0 or -1 means no limit; `max_tokens` None:
    all the context, 0: nothing is computed, but the prompt's token ids come with `Accepted`.

    Of the tokens at one step: `min_p` keeps those at least that likely in units of the likeliest;
    `presence_penalty` is taken off the logit of each token in the output so far, `frequency_penalty` once for
    each time; `repetition_penalty` divides (multiplies a negative) the logit of each token in prompt or
    output; `logit_bias` is added. Before `min_tokens` no token ends the request.

    `logprobs` asks for the log-probability of each output token and of so many best ones, before any of that;
    `prompt_logprobs` for those of the prompt's tokens, which then are all computed, whatever the prefix cache
    has. With it, or with `return_token_ids`, the prompt's token ids come with `Accepted`.

    Only the last `truncate_prompt_tokens` of the prompt are kept, if given; -1: as many as leave room for
    `max_tokens`.

    Only `allowed_token_ids` are chosen, if given. None of `bad_words` comes; preprocess makes
    `banned_token_ids` of them, int32 each, and a client may give such sequences itself.

    `n` choices are drawn behind one prompt. With the same `seed` a request draws the same tokens; without one
    its id gives it a seed: see `with_seed`. The text ends before a stop string, or with
    `include_stop_str_in_output` behind it; it has special tokens with `skip_special_tokens` off.
    With a `grammar` each choice keeps to it.

    After `thinking_budget` output tokens a thought that goes on is ended by the tokens `thinking_end`: the
    client library fills them in, for chats in which the model thinks.

    Raises RequestError, naming the field, when a value is out of range or not finite.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    thinking_budget: int | None = None
    thinking_end: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    banned_token_ids: tuple[bytes, ...] = ()
    truncate_prompt_tokens: int | None = None

    def num_kept_of_prompt(self, max_model_len: int) -> int | None:
        """The number of the prompt's last tokens that are kept; None: all. Raises RequestError for one that
        no prompt can have."""
        kept, name = self.truncate_prompt_tokens, "truncate_prompt_tokens"
        if kept is None:
            return None
        # Without `max_tokens` one token must find room.
        kept = max_model_len - (1 if self.max_tokens is None else self.max_tokens) if kept == -1 else kept
        _check(
            kept >= 1, name, self.truncate_prompt_tokens, "positive: max_tokens leave no room for a prompt"
        )
        _check(kept <= max_model_len, name, kept, f"at most the context's {max_model_len} tokens")
        return kept

    @property
    def returns_prompt(self) -> bool:
        """Whether the client gets the prompt's token ids."""
        return self.return_token_ids or self.prompt_logprobs is not None or self.max_tokens == 0

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_tokens()

    def _check_numbers(self) -> None:
        for name, numbers in RANGES.items():
            value = getattr(self, name)
            _check(value is None or numbers.has(value), name, value, numbers.words)
        _check(self.top_p > 0, "top_p", self.top_p, RANGES["top_p"].words)
        is_less = self.max_tokens is None or self.min_tokens <= self.max_tokens
        _check(is_less, "min_tokens", self.min_tokens, RANGES["min_tokens"].words)

    def _check_lengths(self) -> None:
        for text in self.stop:
            got, limits = f"a string of {len(text)} characters", f"1 to {MAX_STOP_LENGTH} characters each"
            _check(0 < len(text) <= MAX_STOP_LENGTH, "stop", got, limits)
        for name, count, what, limit in (
            ("stop", len(self.stop), "strings", MAX_STOP_STRINGS),
            ("stop_token_ids", len(self.stop_token_ids), "ids", MAX_STOP_TOKEN_IDS),
            ("logit_bias", len(self.logit_bias), "entries", MAX_LOGIT_BIASES),
            ("thinking_end", len(self.thinking_end), "ids", MAX_THINKING_END),
            ("bad_words", len(self.bad_words), "words", MAX_BANS),
            ("banned_token_ids", len(self.banned_token_ids), "sequences", 2 * MAX_BANS),
            ("allowed_token_ids", len(self.allowed_token_ids or ()), "ids", MAX_ALLOWED),
        ):
            _check(count <= limit, name, f"{count} {what}", f"at most {limit} {what}")

    def _check_tokens(self) -> None:
        kept = self.truncate_prompt_tokens
        is_fine = kept is None or kept == -1 or 1 <= kept < MAX_INT32
        _check(is_fine, "truncate_prompt_tokens", kept, "-1 or at least 1")
        for word in self.bad_words:
            limits = f"1 to {MAX_STOP_LENGTH} characters each"
            _check(0 < len(word) <= MAX_STOP_LENGTH, "bad_words", f"{len(word)} characters", limits)
        for ids_of_ban in self.banned_token_ids:
            is_fine = 0 < len(ids_of_ban) <= 4 * MAX_BAN_LENGTH and not len(ids_of_ban) % 4
            what = f"sequences of 1 to {MAX_BAN_LENGTH} int32"
            _check(is_fine, "banned_token_ids", f"{len(ids_of_ban)} bytes", what)
        allowed = self.allowed_token_ids
        _check(allowed is None or bool(allowed), "allowed_token_ids", "an empty list", "a list of token ids")
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", allowed or ()),
            ("thinking_end", self.thinking_end),
        ):
            for token_id in ids:
                _check(0 <= token_id < MAX_INT32, name, token_id, "made of token ids, which are 0 or more")
        for bias in self.logit_bias.values():
            _check(BIASES.has(bias), "logit_bias", bias, BIASES.words)


def with_seed(sampling: SamplingParams, request_id: str, index: int) -> SamplingParams:
    """The sampling of the choice `index` of a request, with the choice's seed.

    Choice i of a request with an explicit seed has seed + i. Without a seed, the choice's seed is a digest of
    the request's id and the index: BLAKE2b of 8 bytes over the id in UTF-8 and the index as 4 bytes, little
    endian, without the highest bit. So the next attempt continues the same random stream, and no client needs
    to draw a seed.
    """
    if sampling.seed is None:
        data = request_id.encode() + index.to_bytes(4, "little")
        seed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % MAX_SEED
    elif index:
        seed = (sampling.seed + index) % MAX_SEED
    else:
        return sampling
    return msgspec.structs.replace(sampling, seed=seed)


def _check(holds: bool, field: str, value: object, limit: str) -> None:
    if not holds:
        got = value if isinstance(value, str) else shown(value)
        raise RequestError(f"{field} must be {limit}, got {got}", field=field)
