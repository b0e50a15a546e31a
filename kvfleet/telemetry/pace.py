"""How fast engines read prompts and write answers, learned from their answers.

What is learned has two parts, because they need different amounts of evidence: the shape of a model's times (what is
fixed, what each token costs), from all its replicas together; and of each replica one `Ratio`, how much slower or
faster than that it is. So a replica that had one request is known about as well as its siblings, and nobody is left
behind with an old guess while the others are measured.

A stream's first byte comes after a fixed time (the way there and back, and the first step), after the prompts in front
of it, and after its own prompt: so much for a prompt, so much for each of its tokens that is not cached. An engine
reads prompts one after the other, in pieces, or a few at a time; either way the time between two first bytes of a busy
engine is the time of the later one's prompt. That is what is fitted, so a queue in front of a prompt, which is known
apart, does not make an engine look slow. A whole answer shows no first byte; its time is fitted with the length of the
answer as a third feature. Steps of decoding grow with the requests that are decoded together.
"""

from __future__ import annotations

import itertools

import attrs

from kvfleet.telemetry.fit import Fit

__all__ = ["Pace", "Prompts", "Rates", "Ratio", "pairs"]

_SERIAL_SHARE = 1 / 8
"""Of a declared time, what one request makes the next one wait: an engine works on about eight at a time."""
_DECODE_S = 0.01
_MOST_SURPRISE = 10.0
_SURE = 8
_KEEP = 0.95
_DRIFT = 0.01
"""Share by which what is usual must move before all replicas are compared with it anew."""
_RECOUNT = 256
_VERSIONS = itertools.count(1)
_GRANTED = 2.0
_SHORT_S = 0.001
_POWER = 0.5
_FIXED, _EACH_PROMPT, _THOUSAND_TOKENS = 0.05, 0.01, 0.2
"""Parts of a time to begin with, of which a stream's first byte is taken to be made."""
_PAIR = 4e-5
"""What a pair of tokens is taken to need, of what a token needs: as on an A100 or H100 with 8 billion parameters."""
_ANSWERS = 64
"""Answers over which the usual one is taken: fewer, and replicas of one model seem to answer differently."""


def pairs(prompt_tokens: float, cached_tokens: float) -> float:
    """Pairs of an uncached token of a prompt and a token before it."""
    uncached = max(prompt_tokens - cached_tokens, 0.0)
    return uncached * (prompt_tokens - uncached / 2)


@attrs.define
class Prompts:
    """Some prompts that an engine computed one after the other, or together.

    Attributes:
        count: How many.
        uncached: Their tokens that were not cached.
        pairs: Pairs of such a token and one before it.
        beside: Answers that were being written beside each of them, summed up.
    """

    count: int = 0
    uncached: float = 0.0
    pairs: float = 0.0
    beside: float = 0.0

    def add(self, prompt_tokens: float, cached_tokens: float, beside: float = 0.0) -> None:
        """One more."""
        self.count += 1
        self.uncached += max(prompt_tokens - cached_tokens, 0.0)
        self.pairs += pairs(prompt_tokens, cached_tokens)
        self.beside += beside


@attrs.frozen
class Rates:
    """What a pace comes to.

    Attributes:
        latency_s: Seconds that every first byte takes, and that nobody else waits for.
        prompt_s: Seconds of the engine for a prompt, whatever its length.
        token_s: Seconds for each prompt token that is not cached.
        pair_s: Seconds for each pair of such a token and one before it: attention, which makes long prompts slow.
        step_s: Seconds of a decode step with one request.
        step_each_s: How much longer it gets with each further one.
        is_guess: True while nothing was measured: what a token takes tells then which of two queues is longer, but not
            what a cache is worth.
    """

    latency_s: float
    prompt_s: float
    token_s: float
    pair_s: float = 0.0
    step_s: float = _DECODE_S
    step_each_s: float = _DECODE_S / 20
    is_guess: bool = False

    @classmethod
    def declared(cls, seconds: float) -> Rates:
        """The rates of an engine of which only a usual time is known."""
        token_s = _THOUSAND_TOKENS * seconds / 1000
        return cls(seconds, _SERIAL_SHARE * seconds, token_s, _PAIR * token_s, is_guess=True)

    def scaled(self, speed: float, step: float) -> Rates:
        """The rates of somebody who takes so many times as long, to read and to write."""
        if speed == step == 1:
            return self
        return Rates(
            self.latency_s * speed,
            self.prompt_s * speed,
            self.token_s * speed,
            self.pair_s * speed,
            self.step_s * step,
            self.step_each_s * step,
            self.is_guess,
        )

    @property
    def sure(self) -> Rates:
        """Without what is only guessed."""
        if not self.is_guess:
            return self  # not attrs.evolve below, which takes five times as long, for hundreds of replicas at once
        return Rates(self.latency_s, self.prompt_s, 0.0, 0.0, self.step_s, self.step_each_s, is_guess=True)

    def under_way_s(self, decoding: float) -> float:
        """What is left of the step under way, on average, before which no prompt is begun."""
        return (self.step_s + self.step_each_s * decoding) / 2 if decoding else 0.0

    def service_s(self, prompt_tokens: float, cached_tokens: float) -> float:
        """Seconds for which a prompt occupies the engine."""
        uncached = max(prompt_tokens - cached_tokens, 0.0)
        return self.prompt_s + self.token_s * uncached + self.pair_s * pairs(prompt_tokens, cached_tokens)


@attrs.define
class Ratio:
    """How many times as long as expected things take: the sum of what they took by the sum of what was expected.

    Newer ones count more, and a few that went as expected are taken for granted. `learned_s` is when that was, for
    whoever chooses what is learned from.
    """

    value: float = 1.0
    seen: int = 0
    error_s: float = 0.0
    learned_s: float = 0.0
    _took: float = 0.0
    _expected: float = 0.0
    _weight: float = 0.0

    def learn(self, seconds: float, expected_s: float) -> None:
        """Something took so long."""
        if expected_s <= 0:
            return
        self.error_s += (abs(seconds - expected_s * self.value) - self.error_s) / min(self.seen + 1, 20)
        seconds = min(max(seconds, expected_s / _MOST_SURPRISE), expected_s * _MOST_SURPRISE)
        self._took = _KEEP * self._took + seconds
        self._expected = _KEEP * self._expected + expected_s
        self._weight = _KEEP * self._weight + 1
        self.seen += 1
        granted = _GRANTED * self._expected / self._weight
        self.value = (granted + self._took) / (granted + self._expected)


@attrs.define
class Pace:
    """What is learned of a model over all its replicas.

    Args:
        prior: The rates to begin with.

    Attributes:
        rates: Learned so far.
        version: Another one whenever the rates, or what replicas are compared with, have changed.
        answer_tokens, answers: Tokens of a usual answer, and of how many that is known.
        streams, wholes: How many first bytes and whole answers it was learned from.
    """

    prior: Rates
    rates: Rates = attrs.field(init=False)
    version: int = attrs.field(init=False, factory=lambda: next(_VERSIONS))
    answer_tokens: float = attrs.field(init=False, default=0.0)
    answers: int = attrs.field(init=False, default=0)
    _stream: Fit = attrs.field(init=False, repr=False)
    _whole: Fit = attrs.field(init=False, repr=False)
    _step: Fit = attrs.field(init=False, repr=False)
    _measured: dict[int, Ratio] = attrs.field(init=False, factory=dict, repr=False)
    _usual: float = attrs.field(init=False, default=1.0, repr=False)
    _shown: float = attrs.field(init=False, default=1.0, repr=False)
    _compared: int = attrs.field(init=False, default=0, repr=False)

    def __attrs_post_init__(self) -> None:
        prior = self.prior
        self.rates = prior
        self._stream = Fit(_first_guess(prior), is_shaped=True)
        self._whole = Fit((prior.latency_s + prior.prompt_s, prior.token_s, prior.pair_s, 0.0))
        self._step = Fit((prior.step_s, prior.step_each_s))

    @property
    def streams(self) -> int:
        """First bytes it was learned from."""
        return self._stream.seen

    @property
    def wholes(self) -> int:
        """Whole answers it was learned from."""
        return self._whole.seen

    @property
    def is_known(self) -> bool:
        """True once there were enough answers to compare replicas by what is left over."""
        return max(self._stream.seen, self._whole.seen) >= _SURE

    def expected_first_bytes_s(self, prompts: Prompts, *, was_idle: bool) -> float:
        """What `learn_first_bytes` would expect."""
        return self._stream(float(was_idle), float(prompts.count), prompts.uncached, prompts.pairs)

    def expected_whole_s(self, prompt_tokens: float, cached_tokens: float, answer_tokens: float) -> float:
        """What `learn_whole` would expect."""
        return self._whole(1.0, *_costs(prompt_tokens, cached_tokens), answer_tokens)

    def learn_first_bytes(self, seconds: float, prompts: Prompts, *, was_idle: bool) -> None:
        """Prompts took so long together, with the way there and back if they met no queue (`was_idle`)."""
        features = (float(was_idle), float(prompts.count), prompts.uncached, prompts.pairs)
        if self._stream.seen >= _SURE:  # a pause of the network or of a garbage collector is no pace
            expected_s = self._stream(*features)
            seconds = min(seconds, _MOST_SURPRISE * expected_s)
        else:
            expected_s = seconds
        # Between weights for equal errors in seconds, which long prompts rule, and in shares, which the shortest do.
        weight = max(expected_s, _SHORT_S) ** -_POWER
        if self._stream.learn(seconds * weight, *[weight * x for x in features]):
            self._refresh()

    def learn_whole(self, seconds: float, prompt_tokens: float, cached_tokens: float, answer_tokens: float) -> None:
        """An answer came in one piece after so long, without the queue in front of it."""
        if self._whole.learn(seconds, 1.0, *_costs(prompt_tokens, cached_tokens), answer_tokens):
            self._refresh()

    def learn_answer(self, tokens: float) -> None:
        """An answer had so many tokens."""
        self.answers += 1
        self.answer_tokens += (tokens - self.answer_tokens) / min(self.answers, _ANSWERS)

    def learn_steps(self, step_s: float, together: float) -> None:
        """Tokens of a stream came so long after each other, with so many other requests being decoded."""
        if self._step.learn(step_s, 1.0, together):
            self._refresh()

    def compare(self, ratio: Ratio, seconds: float, expected_s: float) -> None:
        """One replica took so long for what was expected of all.

        How it compares itself may be another then (see `relative`); what that means for the others is another
        `version`, once it is worth the name.
        """
        is_new = id(ratio) not in self._measured
        self._measured[id(ratio)] = ratio
        before = ratio.value
        ratio.learn(seconds, expected_s)
        self._usual += (ratio.value - before) / len(self._measured)
        self._compared += 1
        if is_new or self._compared >= _RECOUNT:  # what is only moved drifts
            self._recount()
        elif abs(self._usual - self._shown) > _DRIFT * self._shown:
            self._show()

    def forget(self, ratio: Ratio) -> None:
        """That replica's times are too long ago."""
        self._measured.pop(id(ratio), None)
        self._recount()

    def relative(self, ratio: Ratio) -> float:
        """How many times as long as the others one replica takes: what all have in common is the model's pace."""
        return ratio.value / self._shown if ratio.seen else 1.0

    def _recount(self) -> None:
        self._compared = 0
        ratios = self._measured.values()
        self._usual = sum(one.value for one in ratios) / len(ratios) if ratios else 1.0
        self._show()

    def _show(self) -> None:
        self._shown = self._usual
        self.version = next(_VERSIONS)

    def _refresh(self) -> None:
        self.version = next(_VERSIONS)
        step_s, each_s = self._step.coefficients
        if self._stream.seen or not self._whole.seen:
            latency_s, prompt_s, token_s, pair_s = self._stream.coefficients
            self.rates = Rates(latency_s, prompt_s, token_s, pair_s, step_s, each_s)
            return
        fixed_s, token_s, pair_s, answer_s = self._whole.coefficients
        if not self._step.seen and answer_s:
            step_s = answer_s
        self.rates = Rates(fixed_s * (1 - _SERIAL_SHARE), fixed_s * _SERIAL_SHARE, token_s, pair_s, step_s, each_s)


def _first_guess(prior: Rates) -> tuple[float, float, float, float]:
    """What a stream's first byte is taken to be made of before any was seen.

    It matters while all that was seen is alike: a time for prompts of ten tokens is then a fixed one, and a time for
    prompts of twenty thousand is one of tokens. Were it fixed, too, what engines have in their caches would save
    nothing until other prompts come.
    """
    whole_s = max(prior.latency_s + prior.prompt_s, _SHORT_S)
    token_s = prior.token_s or _THOUSAND_TOKENS * whole_s / 1000
    return _FIXED * whole_s, _EACH_PROMPT * whole_s, token_s, prior.pair_s or _PAIR * token_s


def _costs(prompt_tokens: float, cached_tokens: float) -> tuple[float, float]:
    """The features of a prompt: its uncached tokens, and their pairs with those before them."""
    return max(prompt_tokens - cached_tokens, 0.0), pairs(prompt_tokens, cached_tokens)
