"""The registry, and replicas."""

from __future__ import annotations

import pytest

from kvfleet.adapters.call import Operation
from kvfleet.config.models import rank_of
from kvfleet.config.schema import ModelCapabilities, ModelConfig
from kvfleet.registry.models import ModelRegistry, replicas_of


def model(name: str, **known: object) -> ModelConfig:
    """A model at an address of its own."""
    return ModelConfig(name=name, endpoint=f"http://{name}", **known)  # type: ignore[arg-type]


def typed(name: str, model_type: str) -> ModelConfig:
    """A model of some type."""
    return model(name, capabilities=ModelCapabilities(model_type=model_type))


def test_a_model_becomes_one_candidate_for_each_endpoint() -> None:
    """Replicas are used: each is a model of its own, with one endpoint and an id."""
    found = replicas_of(ModelConfig(name="m", endpoint="http://a", replicas=("http://b", "http://a")))
    assert [(r.id, r.endpoint, r.replicas) for r in found] == [
        ("m@http://a", "http://a", ()),
        ("m@http://b", "http://b", ()),
    ]


def test_a_rank_is_a_replica_where_ranks_are_routed_to() -> None:
    """Behind each endpoint so many, told apart by their number."""
    ranked = ModelConfig(name="m", endpoint="http://a", replicas=("http://b/v1",), data_parallel_ranks=2)
    found = replicas_of(ranked)
    assert [r.endpoint for r in found] == ["http://a#0", "http://a#1", "http://b/v1#0", "http://b/v1#1"]
    assert [rank_of(r.endpoint) for r in found] == [0, 1, 0, 1]
    assert [r.all_endpoints() for r in found[:2]] == [("http://a#0",), ("http://a#1",)]
    assert rank_of("http://a") is None


def test_a_self_hosted_engine_without_a_price_is_free() -> None:
    """One's own GPU asks nothing for a token."""
    (replica,) = replicas_of(model("m", provider="vllm"))
    assert (replica.cost_per_1k_input_tokens, replica.cost_per_1k_output_tokens) == (0.0, 0.0)


def test_an_unknown_price_of_a_provider_stays_unknown() -> None:
    """Unknown is unknown, not free."""
    (replica,) = replicas_of(model("m", provider="openai_compat", cost_per_1k_input_tokens=0.5))
    assert (replica.cost_per_1k_input_tokens, replica.cost_per_1k_output_tokens) == (0.5, None)


def test_a_price_that_is_set_holds_for_a_self_hosted_engine_too() -> None:
    """Whoever accounts for their GPUs may say what a token costs."""
    (replica,) = replicas_of(model("m", provider="vllm", cost_per_1k_input_tokens=0.1))
    assert (replica.cost_per_1k_input_tokens, replica.cost_per_1k_output_tokens) == (0.1, 0.0)


def test_a_model_without_an_endpoint_runs_in_this_process() -> None:
    """It still has an endpoint of its own, so that health and load are its own."""
    (replica,) = replicas_of(ModelConfig(name="m", provider="mock"))
    assert replica.id == "m@mock://m"


def test_a_provider_that_is_in_one_place_needs_no_endpoint() -> None:
    """Anthropic is where it is, unless a model says otherwise (a proxy); it is not self-hosted."""
    (replica,) = replicas_of(ModelConfig(name="m", provider="anthropic"))
    assert replica.endpoint == "https://api.anthropic.com"
    assert not replica.is_self_hosted
    (replica,) = replicas_of(ModelConfig(name="m", provider="anthropic", endpoint="http://proxy"))
    assert replica.endpoint == "http://proxy"


def test_disabled_models_have_no_replicas() -> None:
    """What is kept in the file but out of the fleet takes no part."""
    registry = ModelRegistry.from_configs([model("a"), model("b", enabled=False)])
    assert [r.name for r in registry.replicas] == ["a"]
    registry.enable("b")
    registry.disable("a")
    assert [r.name for r in registry.replicas] == ["b"]


def test_operations_go_to_the_models_that_serve_them() -> None:
    """Embedding and rerank models are out of chat; chat models also complete plain text."""
    registry = ModelRegistry.from_configs(
        [typed("chat", "chat"), typed("completion", "completion"), typed("embed", "embedding"), typed("rank", "rerank")]
    )
    found = {operation: [r.name for r in registry.replicas_for(operation)] for operation in Operation}
    assert found == {
        Operation.CHAT: ["chat"],
        Operation.COMPLETION: ["chat", "completion"],
        Operation.EMBEDDING: ["embed"],
        Operation.RERANK: ["rank"],
    }


def test_replicas_are_computed_once_until_something_changes() -> None:
    """The hot path reads a tuple that is there."""
    registry = ModelRegistry.from_configs([model("a")])
    assert registry.replicas is registry.replicas
    first = registry.replicas_for(Operation.CHAT)
    assert registry.replicas_for(Operation.CHAT) is first
    registry.register(model("b"))
    assert [r.name for r in registry.replicas_for(Operation.CHAT)] == ["a", "b"]


def test_a_name_is_taken_once() -> None:
    """Two models of one name are an error, also by renaming."""
    registry = ModelRegistry.from_configs([model("a"), model("b")])
    with pytest.raises(ValueError, match="'a' is already registered"):
        registry.register(model("a"))
    with pytest.raises(ValueError, match="'b' is already registered"):
        registry.update("a", name="b")


def test_an_unknown_name_is_a_key_error() -> None:
    """For getting, changing and taking out alike."""
    registry = ModelRegistry()
    for act in (registry.get, registry.unregister, registry.update, registry.enable, registry.disable):
        with pytest.raises(KeyError, match="no model is called 'x'"):
            act("x")


def test_update_returns_the_changed_copy_and_keeps_the_order() -> None:
    """The model given before is left as it was."""
    old = model("a")
    registry = ModelRegistry.from_configs([old, model("b")])
    new = registry.update("a", name="c", quality_score=0.9)
    assert (old.name, new.name, new.quality_score) == ("a", "c", 0.9)
    assert [m.name for m in registry] == ["c", "b"]
    assert "a" not in registry


def test_unregistering_takes_a_model_out() -> None:
    """It is gone from every list."""
    registry = ModelRegistry.from_configs([model("a"), model("b")])
    registry.unregister("a")
    assert (registry.count, [r.name for r in registry.replicas]) == (1, ["b"])


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["cheap", "able", "local", "embed"]),
        ({"enabled_only": False}, ["cheap", "able", "local", "embed", "off"]),
        ({"provider": "vllm"}, ["local"]),
        ({"tags": {"domain": "coding"}}, ["able"]),
        ({"tags": {"domain": "coding", "tier": "x"}}, []),
        ({"data_class": "confidential"}, ["able", "local", "embed"]),
        ({"min_quality": 0.9}, ["able"]),
        ({"max_cost": 0.01}, ["cheap", "local"]),
        ({"supports_tools": True}, ["able"]),
        ({"supports_json_mode": False}, ["cheap", "local", "embed"]),
        ({"supports_streaming": False}, ["embed"]),
        ({"model_type": "embedding"}, ["embed"]),
        ({"model_type": "chat"}, ["cheap", "able", "local"]),
    ],
)
def test_lists_narrow_by_what_is_asked(asked: dict[str, object], names: list[str]) -> None:
    """Each question leaves out who does not fit, and an unknown price does not fit a limit."""
    registry = ModelRegistry.from_configs(
        [
            model("cheap", cost_per_1k_input_tokens=0.001, allowed_data_classes=("public",)),
            model(
                "able",
                quality_score=0.95,
                tags={"domain": "coding"},
                cost_per_1k_input_tokens=0.05,
                capabilities=ModelCapabilities(supports_tools=True, supports_json_mode=True),
            ),
            model("local", provider="vllm"),
            model("embed", capabilities=ModelCapabilities(model_type="embedding", supports_streaming=False)),
            model("off", enabled=False),
        ]
    )
    assert [m.name for m in registry.list_models(**asked)] == names  # type: ignore[arg-type]


def test_the_summary_tells_of_every_model() -> None:
    """Counts, providers, and a line for each model."""
    registry = ModelRegistry.from_configs([model("a", provider="vllm"), model("b", enabled=False)])
    assert registry.summary() == {
        "total": 2,
        "enabled": 1,
        "providers": {"vllm": 1, "openai_compat": 1},
        "models": [
            {
                "name": "a",
                "provider": "vllm",
                "endpoint": "http://a",
                "enabled": True,
                "quality": 0.5,
                "cost_1k_input": None,
            },
            {
                "name": "b",
                "provider": "openai_compat",
                "endpoint": "http://b",
                "enabled": False,
                "quality": 0.5,
                "cost_1k_input": None,
            },
        ],
    }
    assert (registry.count, registry.enabled_count, len(registry)) == (2, 1, 2)
