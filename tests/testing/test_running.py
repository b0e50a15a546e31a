"""The world a pipeline test runs in: backends, health, load, time, turns."""

from __future__ import annotations

from pathlib import Path

from tests.testing.fleet import passes


class TestTheWorld:
    def test_a_failed_backend_is_left_for_the_next(self, tmp_path: Path) -> None:
        """Faults, statuses and retries: the attempts are those of the live engine."""
        passes(
            tmp_path,
            """
            - name: both small ones are down
              request: {prompt: Hello}
              given: {backends: {small: {fail: connect}}}
              expect: {selected: small, served_by: large, attempts: [small, small, large]}
            - name: everybody fails
              request: {prompt: Hello}
              given: {backends: {small: {fail: overloaded, status: 529}, large: {fail: server_error}}}
              expect: {outcome: failed, error: backend_failed, attempts: [small, small, large]}
            """,
        )

    def test_a_backend_may_fail_for_a_while(self, tmp_path: Path) -> None:
        """`fail_times` counts calls, also those that ask it again; the next turn is answered."""
        passes(
            tmp_path,
            """
            - name: it recovers
              given: {backends: {large: {fail: connect, fail_times: 2}}}
              turns:
                - {request: {prompt: Hello, model: large}, expect: {outcome: failed, attempts: [large, large]}}
                - {request: {prompt: Hello, model: large}, expect: {outcome: answered, attempts: [large]}}
            """,
        )

    def test_latency_is_virtual_and_may_be_a_timeout(self, tmp_path: Path) -> None:
        """A backend that takes an hour times out at the fallback's limit, in no time."""
        passes(
            tmp_path,
            """
            - name: an hour is too long
              request: {prompt: Hello, stream: true}
              given: {backends: {small: {latency_ms: 3600000}}}
              expect: {served_by: large, attempts: [small, small, large]}
            """,
        )

    def test_a_stream_may_break(self, tmp_path: Path) -> None:
        """After the first piece there is no other backend: the route ends as failed, at its 200."""
        passes(
            tmp_path,
            """
            - name: it breaks
              request: {prompt: Hello, stream: true}
              given: {backends: {small: {fail: disconnected, fail_after: 2}}}
              expect: {served_by: small, attempts: [small], outcome: failed, error: stream_interrupted, status: 200}
            """,
        )

    def test_turns_see_what_came_before(self, tmp_path: Path) -> None:
        """A conversation stays where it was, and time that passes between turns lets it go."""
        question = "Tell me all there is to know about the life of the honey bee, from egg to forager."
        passes(
            tmp_path,
            f"""
            - name: the second turn finds the first
              given: {{select: "small@http://b.invalid:8000"}}
              turns:
                - request: {{prompt: {question!r}}}
                  expect: {{served_by: "small@http://b.invalid:8000"}}
                - request:
                    messages:
                      - {{role: user, content: {question!r}}}
                      - {{role: assistant, content: This is a test's answer.}}
                      - {{role: user, content: Go on.}}
                  expect: {{cached: {{"small@http://b.invalid:8000": {{min: 10}}}}}}
                - after_s: 100000
                  request:
                    messages:
                      - {{role: user, content: {question!r}}}
                      - {{role: assistant, content: This is a test's answer.}}
                      - {{role: user, content: Go on.}}
                  expect: {{cached: {{small: {{max: 2}}}}}}
            """,
        )

    def test_load_is_what_the_engines_say(self, tmp_path: Path) -> None:
        """A replica whose engine reports a queue loses to its idle sibling."""
        passes(
            tmp_path,
            """
            - name: the idle one
              request: {prompt: Hello, strategy: latency_first, model: small}
              given: {load: {"small@http://a.invalid:8000": {running: 8, waiting: 30, kv_usage: 0.9}}}
              expect: {selected: "small@http://b.invalid:8000"}
            - name: the other idle one
              request: {prompt: Hello, strategy: latency_first, model: small}
              given: {load: {"small@http://b.invalid:8000": {waiting: 30}}}
              expect: {selected: "small@http://a.invalid:8000"}
            """,
        )

    def test_a_choice_can_be_forced(self, tmp_path: Path) -> None:
        """`select` puts somebody first whatever the strategy says, until a turn says otherwise."""
        passes(
            tmp_path,
            """
            - name: forced
              given: {select: large}
              turns:
                - {request: {prompt: Hello}, expect: {selected: large}}
                - {request: {prompt: Hello, strategy: random}, expect: {selected: large}}
                - {request: {prompt: Hello}, given: {select: small}, expect: {selected: small}}
            """,
        )

    def test_requests_of_every_operation(self, tmp_path: Path) -> None:
        """Messages, bodies, text completions; who serves what is the registry's word."""
        passes(
            tmp_path,
            """
            - {name: messages, request: {messages: [{role: user, content: Hi}]}, expect: {outcome: answered}}
            - {name: body, request: {body: {messages: [{role: user, content: Hi}], n: 2}}, expect: {status: 200}}
            - {name: text, request: {prompt: Hi, operation: completion}, expect: {outcome: answered}}
            - name: nobody embeds
              request: {prompt: Hi, operation: embedding}
              expect: {outcome: no_candidates, error: model_not_found, status: 404}
            - name: a public request may go to the cloud
              request: {prompt: Hi, data_class: public, models: [cloud]}
              expect: {served_by: cloud}
            - name: an internal one may not
              request: {prompt: Hi, models: [cloud]}
              expect: {status: 403, dropped: {cloud: {by: filter.policy}}}
            """,
        )
