"""The router's decisions, event by event."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from shoal.cluster.replica_spec import Role
from shoal.cluster.routing.groups import GroupSpec
from shoal.cluster.routing.prefixes import PREFIX_TOKENS
from shoal.cluster.routing.request_router import (
    Deliver,
    Effect,
    RequestRouter,
    Send,
)
from shoal.cluster.workers.wire import EndPrefill, Event
from shoal.parallel.kv_transport import KVChunk
from shoal.parallel.request_id import RequestId
from shoal.runtime.types import (
    EngineOutput,
    Finished,
    GeneratedTokens,
    Logprob,
    Prefilled,
    PromptLoaded,
    Request,
    RequestOutput,
    SamplingParams,
    Tokens,
)
from tests.support import model_engine


def spec(role: Role, max_num_seqs: int = 4, num_kv_tokens: int = 1000) -> GroupSpec:
    return GroupSpec(role=role, max_num_seqs=max_num_seqs, num_kv_tokens=num_kv_tokens)


def router(*groups: GroupSpec, max_model_len: int = 100) -> RequestRouter:
    return RequestRouter(groups, max_model_len=max_model_len)


def ask(request_id: str, num_prompt: int = 4, max_tokens: int | None = 6, **fields: Any) -> Request:
    params = fields.pop("params", {})
    prompt = fields.pop("prompt", (1,) * num_prompt)
    return Request(
        request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens, **params), **fields
    )


def rid(name: str) -> RequestId:
    """`a#1` is the second attempt at request a."""
    request_id, _, attempt = name.partition("#")
    return RequestId(request_id, int(attempt or 0))


def chunk(name: str, start: int = 0, end: int = 4) -> KVChunk:
    return model_engine.chunk(rid(name), start, end)


def tokens(name: str, start: int, *token_ids: int) -> Tokens:
    return Tokens(id=rid(name), sample_index=0, start=start, token_ids=token_ids)


def prefilled(name: str, **fields: Any) -> Prefilled:
    """The end of the work of a prefill group."""
    return Prefilled(id=rid(name), **{"num_cached_tokens": 0, "handed_over": True, **fields})


def end(name: str, num_tokens: int) -> Finished:
    return Finished(id=rid(name), sample_index=0, reason="length", num_tokens=num_tokens)


def loaded(name: str, error: str | None = None) -> PromptLoaded:
    return PromptLoaded(id=rid(name), error=error)


def hand_over(r: RequestRouter, group: int, name: str, first: int = 9, **fields: Any) -> list[Effect]:
    """A prefill group reports the first token and the end of its work."""
    return [*r.handle(group, tokens(name, 0, first)), *r.handle(group, prefilled(name, **fields))]


def answer(r: RequestRouter, group: int, name: str, *token_ids: int) -> list[Effect]:
    """A group reports a whole answer and its end."""
    return [*r.handle(group, tokens(name, 0, *token_ids)), *r.handle(group, end(name, len(token_ids)))]


def sent(effects: list[Effect]) -> list[tuple[int, str]]:
    """Where each command goes, and what it is."""
    found = []
    for effect in effects:
        if isinstance(effect, Send):
            command = effect.command
            kind = type(command).__name__
            if isinstance(command, Request):
                kind = "prefill" if command.do_remote_decode else "decode" if command.do_remote_prefill else "whole"
            found.append((effect.group, f"{kind} {command.id.request_id}#{command.id.attempt}"))
    return found


def delivered(effects: list[Effect]) -> list[EngineOutput | RequestOutput]:
    return [effect.output for effect in effects if isinstance(effect, Deliver)]


def answered(effects: list[Effect]) -> dict[str, list[int]]:
    """The requests that are finished, and their tokens."""
    outputs = [output for output in delivered(effects) if isinstance(output, RequestOutput)]
    assert all(output.finished for output in outputs)
    return {output.request_id: output.outputs[0].token_ids for output in outputs}


def new_tokens(effects: list[Effect]) -> list[tuple[int, tuple[int, ...]]]:
    """Where new tokens start, and what they are."""
    return [(output.start, output.token_ids) for output in delivered(effects) if isinstance(output, Tokens)]


def test_mixed_groups_share_by_outstanding_tokens() -> None:
    r = router(spec("mixed"), spec("mixed"), max_model_len=80)
    effects = r.submit(
        [
            ask("a", 1, 4),  # 5, 0
            ask("b", 2, 9, params={"n": 2}),  # 5, 20
            ask("c", 1, 4),  # 10, 20
            ask("d", 10, None),  # to the end of the context, 70 more: 90, 20
            ask("e", 1, 1),
        ]
    )
    assert sent(effects) == [(0, "whole a#0"), (1, "whole b#0"), (0, "whole c#0"), (0, "whole d#0"), (1, "whole e#0")]
    assert answered(answer(r, 1, "e#0", 7)) == {"e": [7]}
    assert r.num_in_flight == 4
    assert answer(r, 1, "e#0", 7) == []


def test_the_way_of_a_request_through_both_roles() -> None:
    r = router(spec("prefill"), spec("decode"), spec("decode"))
    assert sent(r.submit([ask("a", params={"prompt_logprobs": 1})])) == [(0, "prefill a#0")]
    (first, second) = r.handle(0, chunk("a#0", 0, 2))
    assert sent([first, second]) == [(1, "decode a#0"), (1, "KVChunk a#0")]
    assert isinstance(first, Send)
    assert isinstance(first.command, Request)
    assert first.command.params.prompt_logprobs is None, "the prefill group has them"
    assert sent(r.handle(0, chunk("a#0", 2, 4))) == [(1, "KVChunk a#0")]
    assert new_tokens(r.handle(0, tokens("a#0", 0, 9))) == [(0, (9,))]
    scores: tuple[dict[int, Logprob] | None, ...] = (None, {1: Logprob(-0.5, 1)})
    effects = r.handle(0, prefilled("a#0", prompt_logprobs=scores, num_cached_tokens=3))
    assert delivered(effects) == [prefilled("a#0", prompt_logprobs=scores, num_cached_tokens=3)]
    assert [e.command for e in effects if isinstance(e, Send)] == [EndPrefill(rid("a#0"), (GeneratedTokens((9,)),))]
    assert sent(r.handle(1, loaded("a#0"))) == [(0, "Abort a#0")], "its KV cache is not needed any more"
    assert new_tokens(r.handle(1, tokens("a#0", 0, 9, 8, 7))) == [(1, (8, 7))], "the first token is known"
    assert new_tokens(r.handle(1, tokens("a#0", 3, 6))) == [(3, (6,))]
    effects = r.handle(1, end("a#0", 4))
    assert answered(effects) == {"a": [9, 8, 7, 6]}
    (*_, output) = delivered(effects)
    assert isinstance(output, RequestOutput)
    assert (output.prompt_logprobs, output.num_cached_tokens) == (list(scores), 3)
    assert (r.num_in_flight, r.num_failed_transfers) == (0, 0)


def test_an_answer_of_one_token_needs_no_decode() -> None:
    r = router(spec("prefill"), spec("decode"))
    r.submit([ask("a")])
    r.handle(0, chunk("a#0"))
    assert sent(r.handle(0, prefilled("a#0", handed_over=False))) == []
    effects = answer(r, 0, "a#0", 9)
    assert answered(effects) == {"a": [9]}
    assert (1, "Abort a#0") in sent(effects)


def test_a_known_beginning_is_worth_its_tokens() -> None:
    r = router(*[spec("mixed", num_kv_tokens=10**6)] * 2, max_model_len=10**6)
    beginning = tuple(range(3 * PREFIX_TOKENS))
    r.submit([ask("a", prompt=(*beginning, 1), max_tokens=1)])  # to group 0
    assert sent(r.submit([ask("b", prompt=(*beginning, 2), max_tokens=1)])) == [(1, "whole b#0")], (
        "770 tokens are ahead of it there, more than the 768 that need not be computed"
    )
    answer(r, 0, "a#0", 1)
    r.submit([ask("other", prompt=(5,) * 600, max_tokens=1)])
    answer(r, 1, "b#0", 1)
    # Both computed the beginning; group 0 has 601 tokens to compute.
    assert sent(r.submit([ask("c", prompt=(*beginning, 3), max_tokens=1)])) == [(1, "whole c#0")]
    answer(r, 1, "c#0", 1)
    assert sent(r.submit([ask("d", prompt=(6,) * 700, max_tokens=1)])) == [(1, "whole d#0")]
    # Group 1 has 701 tokens to compute, group 0 has 601; but group 1 knows 512 of these.
    assert sent(r.submit([ask("e", prompt=(6,) * 600, max_tokens=1)])) == [(1, "whole e#0")]


def test_more_than_a_group_can_hold_waits_where_any_group_can_take_it() -> None:
    r = router(spec("mixed", 4), spec("mixed", 4))
    assert len(sent(r.submit([ask(str(i)) for i in range(14)]))) == 2 * 5
    assert sent(answer(r, 1, "1#0", 5)) == [(1, "whole 10#0")]
    assert r.num_in_flight == 13


def test_a_prefill_group_with_time_answers_what_no_decode_group_has_room_for() -> None:
    r = router(spec("prefill", 8), spec("decode", 8, num_kv_tokens=20))
    assert sent(r.submit([ask("a", 12), ask("b", 9), *(ask(i, 2) for i in "cdefg")])) == [(0, "prefill a#0")], (
        "the decode group is kept for b, and a waits for the prefill group"
    )
    r.handle(0, chunk("a#0", 0, 12))
    effects = hand_over(r, 0, "a#0", 9)
    assert sent(effects) == [(1, "EndPrefill a#0"), (0, "whole b#0"), (0, "prefill c#0"), (0, "prefill d#0")]
    assert sent(answer(r, 0, "c#0", 9)) == [(1, "Abort c#0"), (0, "prefill e#0")]
    assert sent(answer(r, 1, "a#0", 9, 8)) == [
        (0, "Abort a#0"),
        (0, "prefill f#0"),
        (0, "prefill g#0"),
    ]


def test_half_of_a_prefill_group_is_left_for_prompts_to_come() -> None:
    r = router(spec("prefill", 4), spec("decode", 1))
    assert sent(r.submit([ask(str(i)) for i in range(9)])) == [(0, "prefill 0#0"), (0, "prefill 1#0")]
    assert sent(hand_over(r, 0, "0#0", 9)) == [(1, "decode 0#0"), (1, "EndPrefill 0#0")]
    # Nobody waits for it any more.
    assert sent(hand_over(r, 0, "1#0", 9))[2:] == [(0, "whole 2#0"), (0, "whole 3#0")]
    assert sent(answer(r, 1, "0#0", 9, 8)) == [(0, "Abort 0#0"), (0, "prefill 4#0")]


def test_a_decode_group_with_nothing_to_do_computes_prompts() -> None:
    r = router(spec("prefill", 1), *[spec("decode", 8)] * 3)
    effects = r.submit([ask(i) for i in "abcd"])
    assert sent(effects) == [(0, "prefill a#0"), (0, "prefill b#0"), (3, "whole c#0")], "no place for another prompt"
    assert sent(answer(r, 3, "c#0", 1)) == [(3, "whole d#0")]


def test_room_is_for_sequences_and_for_what_is_known_of_them() -> None:
    r = router(spec("mixed", 8, 64), max_model_len=64)
    assert len(r.submit([ask("n", 4, params={"n": 8}), ask("a", 4), ask("b", 4), ask("c", 4)])) == 3
    r.abort("n")
    r.abort("a")
    # b and c have 10 tokens with the next ones of each; the known ones count from the beginning.
    known = (GeneratedTokens((7,) * 40),)
    assert sent(r.submit([ask("d", 10, 50, generated=known), ask("e", 2)])) == [(0, "whole d#0"), (0, "whole e#0")]
    assert sent(r.submit([ask("f", 1)])) == [], "64 of 64 are taken"
    r.abort("b")
    r.check_integrity()


def test_what_is_generated_takes_room() -> None:
    r = router(spec("mixed", 8, 64), max_model_len=64)
    r.submit([ask("a", 4, 60)])
    r.handle(0, tokens("a#0", 0, *range(40)))
    assert sent(r.submit([ask("b", 19), ask("c", 18)])) == [], "45 are taken, and 20 wanted"
    assert sent(r.abort("b")) == [(0, "whole c#0")]
    r.check_integrity()


def test_a_partner_is_reserved_with_all_that_is_known() -> None:
    r = router(spec("prefill", 8), spec("decode", 8, 40), spec("decode", 8, 40))
    assert sent(r.submit([ask("a", 4, 30, generated=(GeneratedTokens((7,) * 20),))])) == [(0, "prefill a#0")]
    assert r._tracked["a"].decode == 1
    r.submit([ask("b", 10)])
    assert r._tracked["b"].decode == 2
    r.submit([ask("c", 20)])
    assert r._tracked["c"].decode == 2, "25 of 40 are taken in the one, 11 in the other"
    r.check_integrity()


def test_a_request_without_room_is_passed_elsewhere_but_not_for_ever() -> None:
    r = router(*[spec("mixed", 8, 100)] * 2, max_model_len=100)
    r.submit([ask("a", 40), ask("b", 50)])
    assert sent(r.submit([ask("big", 90), *(ask(str(i), 9) for i in range(5))])) == [
        *((1, f"whole {i}#0") for i in range(4)),
    ], "group 0, which has less to do, is kept for it"
    assert sent(answer(r, 1, "b#0", 1)) == [(1, "whole 4#0")]
    assert sent(r.submit([ask("late", 9)])) == [(1, "whole late#0")]
    assert sent(answer(r, 0, "a#0", 1)) == [(0, "whole big#0")]
    r.check_integrity()


def test_a_kept_group_is_not_joined_for_what_its_cache_has() -> None:
    r = router(*[spec("mixed", 8, 1000)] * 2, max_model_len=1000)
    known = (7,) * PREFIX_TOKENS
    r.submit([ask("a", prompt=known), ask("b", 600), ask("big", 900)])
    assert r._groups[0].reserved_for == "big"
    assert sent(r.submit([ask("c", prompt=known)])) == [(1, "whole c#0")]


def test_one_that_needs_many_places_is_passed_by_one_that_needs_more_cache() -> None:
    r = router(*[spec("mixed", 8, 100)] * 2)
    r.submit([ask("a", 4, params={"n": 8}), ask("b", 4, params={"n": 8})])
    assert sent(r.submit([ask("c", 1, params={"n": 4}), ask("d", 20)])) == [(1, "whole d#0")]


@pytest.mark.parametrize("end", ["abort", "another has room", "the group is lost"])
def test_a_group_is_kept_only_as_long_as_somebody_waits_for_it(end: str) -> None:
    r = router(*[spec("mixed", 8, 100)] * 2, max_model_len=100)
    r.submit([ask("a", 40), ask("b", 50), ask("big", 90), ask("c", 40)])
    assert r._tracked["c"].decode == 1
    assert r._groups[0].reserved_for == "big"
    if end == "abort":
        r.abort("big")
        assert r._groups[0].reserved_for is None
    elif end == "another has room":
        r.abort("b")
        assert sent(r.abort("c")) == [(1, "Abort c#0"), (1, "whole big#0")]
        assert r._groups[0].reserved_for is None
    else:
        r.lose(0)
        assert r._groups[1].reserved_for == "a", "which was given back and comes first"
        assert sent(r.restore(0)) == [(0, "whole a#1")]
        assert [g.reserved_for for g in r._groups] == ["big", None]
    r.check_integrity()


def test_a_lost_prefill_group_is_kept_for_nobody() -> None:
    r = router(spec("prefill", 8, 100), spec("prefill", 8, 100), spec("decode", 8, 1000), max_model_len=100)
    r.submit([ask("a", 40), ask("b", 50), ask("big", 90)])
    assert [g.reserved_for for g in r._groups] == ["big", None, None]
    r.handle(0, chunk("a#0"))
    assert sent(r.lose(0)) == [(2, "EndPrefill a#0")]
    assert [g.reserved_for for g in r._groups] == [None, "big", None]
    r.check_integrity()


def test_a_request_may_need_a_prefill_and_a_decode_group_to_empty() -> None:
    r = router(spec("prefill", 8, 100), spec("decode", 8, 100), max_model_len=100)
    r.submit([ask("a", 50)])
    hand_over(r, 0, "a#0", 1)
    r.submit([ask("b", 40), ask("c", 2)])
    assert sent(r.submit([ask("big", 90)])) == []
    assert [g.reserved_for for g in r._groups] == ["big", None]
    hand_over(r, 0, "b#0", 1)
    assert sent(r.submit([ask("d", 2)])) == [], "the prefill group is kept"
    effects = hand_over(r, 0, "c#0", 1)
    assert sent(effects)[-2:] == [(0, "whole big#0"), (0, "whole d#0")], "with nothing else to do, it answers alone"
    r.check_integrity()


def test_a_lost_decode_group_gives_back_what_it_had_with_what_is_known() -> None:
    r = router(spec("prefill"), spec("decode"), spec("decode"))
    r.submit([ask("a")])
    r.handle(0, chunk("a#0"))
    hand_over(r, 0, "a#0", 9)
    r.handle(1, loaded("a#0"))
    r.handle(1, tokens("a#0", 1, 8, 7))
    assert sent(r.lose(1)) == [(0, "prefill a#1")]
    assert answer(r, 1, "a#0", 9, 8, 7, 6) == [], "late, from before"
    (request, _) = r.handle(0, chunk("a#1"))
    assert isinstance(request, Send)
    assert isinstance(request.command, Request)
    assert request.group == 2
    assert request.command.generated == (GeneratedTokens((9, 8, 7)),)
    assert r.num_replays == 1


def test_what_a_group_told_in_an_earlier_life_counts_for_nothing() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a")])
    r.lose(0)
    assert sent(r.restore(0)) == [(0, "whole a#1")]
    assert answer(r, 0, "a#0", 9, 8) == []
    assert r.handle(0, tokens("a#0", 0, 9)) == []
    assert answered(answer(r, 0, "a#1", 9, 8)) == {"a": [9, 8]}


def test_a_lost_prefill_group_leaves_the_rest_to_the_decode_group_or_to_another() -> None:
    r = router(spec("prefill"), spec("prefill"), spec("decode"))
    r.submit([ask("begun"), ask("other"), ask("not begun")])
    r.handle(0, chunk("begun#0", 0, 2))
    effects = r.lose(0)
    assert next(e.command for e in effects if isinstance(e, Send)) == EndPrefill(rid("begun#0"), None)
    assert sent(effects)[1:] == [(2, "Abort not begun#0"), (1, "prefill not begun#1")]
    assert r.handle(0, chunk("begun#0", 2, 4)) == []
    assert answered(answer(r, 2, "begun#0", 1)) == {"begun": [1]}
    assert sent(r.lose(1)) == [
        (2, "Abort other#0"),
        (2, "Abort not begun#1"),
        (2, "whole other#1"),
        (2, "whole not begun#2"),
    ], "in order of arrival, where somebody is left"


def test_a_prefill_group_that_is_lost_after_its_work_is_told_nothing() -> None:
    r = router(spec("prefill"), spec("decode"))
    r.submit([ask("a"), ask("b")])
    hand_over(r, 0, "a#0", 9)
    hand_over(r, 0, "b#0", 9)
    assert sent(r.lose(0)) == []
    assert sent(r.handle(1, loaded("a#0"))) == []
    assert sent(answer(r, 1, "b#0", 9, 8)) == []
    assert sent(r.abort("a")) == [(1, "Abort a#0")]


def test_an_abort_reaches_everyone_who_knows_of_the_request() -> None:
    r = router(spec("prefill", 1), spec("decode", 8))
    assert sent(r.submit([ask(i) for i in "abcd"])) == [(0, "prefill a#0"), (0, "prefill b#0")]
    r.handle(0, chunk("a#0"))
    assert sent(r.abort("c")) == []
    assert sent(r.abort("a")) == [(0, "Abort a#0"), (1, "Abort a#0"), (0, "prefill d#0")]
    assert r.abort("a") == []
    assert r.num_in_flight == 2


def test_events_that_come_twice_or_late_or_never_change_nothing() -> None:
    r = router(spec("prefill"), spec("decode"))
    r.submit([ask("a", max_tokens=9)])
    first: list[Event] = [chunk("a#0", 0, 2), chunk("a#0", 2, 4), tokens("a#0", 0, 9), prefilled("a#0")]
    for event in first:
        r.handle(0, event)
    assert sent(r.handle(0, first[0])) == [(1, "KVChunk a#0")], "the engine knows it"
    assert r.handle(0, first[2]) == []
    assert r.handle(0, first[3]) == []
    failed = loaded("a#0", "cut off")
    assert sent(r.handle(1, failed)) == [(0, "Abort a#0")]
    assert r.handle(1, failed) == []
    assert r.num_failed_transfers == 1
    assert [r.handle(0, event) for event in first] == [[]] * 4, "it has nothing to do with it any more"
    assert new_tokens(r.handle(1, tokens("a#0", 1, 8, 7))) == [(1, (8, 7))]
    assert r.handle(1, tokens("a#0", 1, 8, 7)) == []
    assert r.handle(1, tokens("a#0", 5, 4)) == [], "behind a gap"
    assert new_tokens(r.handle(1, tokens("a#0", 2, 7, 6, 5))) == [(3, (6, 5))]
    assert r.handle(1, tokens("a#0", 0, 9)) == []
    r.lose(1)
    assert r.handle(1, tokens("a#0", 5, 4)) == [], "of an earlier attempt"
    assert r.handle(1, end("a#0", 5)) == []
    r.check_integrity()


def test_an_end_whose_tokens_never_came_starts_another_attempt_from_those_that_did() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a")])
    r.handle(0, tokens("a#0", 0, 9, 8))
    effects = r.handle(0, end("a#0", 3))
    assert sent(effects) == [(0, "Abort a#0"), (0, "whole a#1")]
    (*_, last) = effects
    assert isinstance(last, Send)
    assert isinstance(last.command, Request)
    assert last.command.generated == (GeneratedTokens((9, 8)),)
    assert answered(answer(r, 0, "a#1", 9, 8, 7)) == {"a": [9, 8, 7]}


def test_a_prefill_whose_first_token_never_came_counts_as_failed() -> None:
    r = router(spec("prefill"), spec("decode"))
    r.submit([ask("a")])
    effects = r.handle(0, prefilled("a#0"))
    assert [e.command for e in effects if isinstance(e, Send)][-1] == EndPrefill(rid("a#0"), None)
    assert answered(answer(r, 1, "a#0", 9, 8)) == {"a": [9, 8]}


def test_every_sample_of_a_request_must_end() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a", params={"n": 2})])
    second = replace(end("a#0", 1), sample_index=1)
    r.handle(0, replace(tokens("a#0", 0, 5), sample_index=1))
    assert delivered(r.handle(0, second)) == [second]
    assert r.handle(0, second) == []
    effects = answer(r, 0, "a#0", 9, 8)
    (*_, output) = delivered(effects)
    assert isinstance(output, RequestOutput)
    assert [(o.index, o.token_ids, o.finish_reason) for o in output.outputs] == [
        (0, [9, 8], "length"),
        (1, [5], "length"),
    ]


def test_logprobs_of_overlapping_reports_stay_with_their_tokens() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a", params={"logprobs": 0})])
    scored = [{t: Logprob(-t / 10, 1, chr(97 + t))} for t in range(4)]

    def told(start: int, stop: int) -> Tokens:
        return replace(tokens("a#0", start, *range(start, stop)), logprobs=tuple(scored[start:stop]))

    r.handle(0, told(0, 3))
    assert delivered(r.handle(0, told(1, 4))) == [told(3, 4)]
    without_text = tuple({t: Logprob(-t / 10, 1)} for t in range(4))
    assert r._tracked["a"].known == (GeneratedTokens((0, 1, 2, 3), without_text),)
    (*_, output) = delivered(r.handle(0, end("a#0", 4)))
    assert isinstance(output, RequestOutput)
    assert output.outputs[0].logprobs == scored
    assert output.outputs[0].cumulative_logprob == -0.0 - 0.1 - 0.2 - 0.3


def test_tokens_that_came_with_a_request_are_not_news_to_whoever_asked() -> None:
    """Their text is: it is not in a journal."""
    r = router(spec("mixed"))
    r.submit([ask("a", generated=(GeneratedTokens((9, 8)),))])
    assert delivered(r.handle(0, replace(tokens("a#0", 0, 9), text="x"))) == []
    assert r._tracked["a"].known == (GeneratedTokens((9, 8)),)
    whole = replace(tokens("a#0", 0, 9, 8, 7), text="xyz")
    assert delivered(r.handle(0, whole)) == [replace(tokens("a#0", 2, 7), text_start=1, text="yz")]
    (*_, output) = delivered(r.handle(0, end("a#0", 3)))
    assert isinstance(output, RequestOutput)
    assert (output.outputs[0].token_ids, output.outputs[0].text) == ([9, 8, 7], "xyz")


def test_a_stream_never_goes_back() -> None:
    r = router(spec("mixed"), spec("mixed"))
    r.submit([ask("a", report="step")])
    assert new_tokens(r.handle(0, tokens("a#0", 0, 9, 8))) == [(0, (9, 8))]
    assert r.handle(0, tokens("a#0", 0, 9)) == [], "late"
    assert r.handle(0, tokens("a#0", 0, 9, 8)) == [], "twice"
    effects = r.lose(0)
    assert sent(effects) == [(1, "whole a#1")]
    assert r.handle(1, tokens("a#1", 0, 9)) == []
    assert r.handle(1, tokens("a#1", 0, 9, 8)) == []
    assert new_tokens(r.handle(1, tokens("a#1", 0, 9, 8, 7))) == [(2, (7,))]
    assert answered(r.handle(1, end("a#1", 3))) == {"a": [9, 8, 7]}


@pytest.mark.parametrize("what", ["prefill is lost", "transfer fails", "decode answers"])
def test_scores_of_a_prompt_are_not_lost_with_its_prefill(what: str) -> None:
    r = router(spec("prefill"), spec("prefill"), spec("decode"))
    r.submit([ask("a", params={"prompt_logprobs": 1})])
    r.handle(0, chunk("a#0", 0, 2))
    if what == "prefill is lost":
        effects = r.lose(0)
    elif what == "transfer fails":
        effects = r.handle(2, loaded("a#0", "cut off"))
    else:  # its news that the transfer failed is late
        effects = answer(r, 2, "a#0", 9, 8)
    (asked,) = [e.command for e in effects if isinstance(e, Send) and isinstance(e.command, Request)]
    assert asked.id == rid("a#1")
    assert asked.params.prompt_logprobs == 1
    assert not asked.do_remote_decode, "nothing of it can get lost between two groups again"
    r.check_integrity()


def test_a_prompt_whose_scores_were_lost_need_not_wait_for_an_idle_group() -> None:
    r = router(spec("prefill"), spec("decode"))
    r.submit([ask("a", params={"prompt_logprobs": 1}), ask("b")])
    r.handle(0, chunk("a#0", 0, 2))
    effects = r.handle(1, loaded("a#0", "cut off"))
    assert sent(effects) == [(0, "Abort a#0"), (1, "Abort a#0"), (0, "whole a#1")]


def test_an_id_that_is_free_again_is_sent_once() -> None:
    r = router(spec("mixed", 1))
    r.submit([ask("x"), ask("y"), ask("a")])
    r.abort("a")
    r.submit([ask("b"), ask("a")])
    assert sent(r.abort("x")) == [(0, "Abort x#0"), (0, "whole b#0")]
    assert sent(r.abort("y")) == [(0, "Abort y#0"), (0, "whole a#0")]
    assert sent(r.abort("b")) == [(0, "Abort b#0")]
    r.check_integrity()


def test_an_id_in_use_is_refused_and_nothing_taken() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a")])
    for asked in ([ask("b"), ask("a")], [ask("c"), ask("c")]):
        with pytest.raises(ValueError, match="is already in flight"):
            r.submit(asked)
    assert r.num_in_flight == 1


def test_only_allowed_requests_are_sent_and_the_others_keep_their_order() -> None:
    r = router(spec("mixed", max_num_seqs=2))
    r.submit([ask("a")])
    assert r.restrict(frozenset({"c"})) == []
    assert r.submit([ask("b")]) == []
    assert sent(r.submit([ask("c")])) == [(0, "whole c#0")]
    r.check_integrity()
    assert r.abort("b") == []
    assert r.submit([ask("d"), ask("e")]) == []
    assert sent(answer(r, 0, "c#0", 9)) == []
    assert sent(r.restrict(None)) == [(0, "whole d#0"), (0, "whole e#0")]
    r.check_integrity()


def test_a_lost_request_that_is_not_allowed_waits() -> None:
    r = router(spec("mixed"), spec("mixed"))
    r.submit([ask("a"), ask("b")])
    r.restrict(frozenset({"b"}))
    assert sent(r.lose(0)) == []
    r.check_integrity()
    assert sent(r.restrict(frozenset({"a", "b"}))) == [(1, "whole a#1")]


def test_a_request_that_fails_is_answered_with_an_error_and_its_groups_forget_it() -> None:
    r = router(spec("mixed"))
    r.submit([ask("a")])
    effects = r.fail("a", "its worker was lost 4 times")
    (output,) = delivered(effects)
    assert isinstance(output, RequestOutput)
    assert (output.request_id, output.finished) == ("a", True)
    assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", "its worker was lost 4 times")
    assert sent(effects) == [(0, "Abort a#0")]
    assert r.num_in_flight == 0
    assert r.fail("a", "again") == []
