"""`routing_config` and names: every knob is executed, and none is ignored."""

from __future__ import annotations

import random
from typing import Any

import pytest

from elastic_moe import ElasticRoutingConfig
from elastic_moe.engine.running.runner import Chunk
from tests.logprobs import log_softmax
from tests.server.conftest import Running

LENGTH = {"temperature": 0, "max_tokens": 1}
ANSWERED = ("active_layers", "top_k", "expert_width", "sparsity", "expert_pool", "min_experts")


def draw_knobs(draw: random.Random, served: Running) -> dict[str, Any]:
    shape = served.engine.shape
    layers = sorted(draw.sample(range(shape.num_layers), draw.randint(1, shape.num_layers)))
    pool = draw.randint(1, shape.num_experts)
    top_k = draw.randint(1, min(pool, shape.max_top_k))
    knobs = {
        draw.choice(["active_layers", "activeLayers"]): layers,
        draw.choice(["top_k", "topK", "routing_top_k", "routingTopK"]): top_k,
        draw.choice(["expert_width", "expertWidth"]): draw.randint(1, shape.width_granules),
        draw.choice(["sparsity", "sparsity_threshold", "sparsityThreshold"]): draw.random(),
        draw.choice(["expert_pool", "expertPool"]): pool,
        draw.choice(["min_experts", "minExperts"]): draw.randint(1, top_k),
    }
    return {key: knobs[key] for key in knobs if draw.random() < 0.8}


@pytest.mark.parametrize("seed", range(20))
def test_knobs_are_executed(served: Running, seed: int) -> None:
    """Log-probabilities over HTTP are those of scoring; the answer tells what ran."""
    draw = random.Random(seed)
    knobs = draw_knobs(draw, served)
    ids = [draw.randrange(5, 4000) for _ in range(30)]
    done = served.complete(ids, routing_config=knobs, echo=True, logprobs=0, **LENGTH)
    config = ElasticRoutingConfig.full(**knobs)
    subnet = served.engine.resolve(config)
    rows = log_softmax(served.engine.score(ids, subnet))
    reported = done["choices"][0]["logprobs"]["token_logprobs"]
    for i, token in enumerate(ids[1:], 1):
        assert reported[i] == pytest.approx(float(rows[i - 1, token]), abs=1e-6)
    assert done["routing"]["name"] == subnet.name
    assert done["routing"]["active_layers"] == list(subnet.active_layers)
    runner = served.engine.runner
    step = runner.run([Chunk(runner.open(subnet, len(ids)), ids)])
    mean = step.experts_run[0] / len(ids) / subnet.depth  # the native step's own count
    assert done["routing"]["mean_experts"] == pytest.approx(mean)
    assert done["routing"]["flops_per_token"] == subnet.flops_per_token(len(ids) // 2, mean)
    assert done["routing"]["active_params"] == subnet.active_params
    again = {k: done["routing"][k] for k in ANSWERED}
    for back in (again, done["routing"]):
        answer = served.complete(ids, routing_config=back, echo=True, logprobs=0, **LENGTH)
        assert answer["routing"] == done["routing"]


def test_values_per_layer_come_back_as_an_answer_and_as_a_name(served: Running) -> None:
    shape = served.engine.shape
    top_k = [1] + [2] * (shape.num_layers - 1)
    pool = [[3, 1, 0]] + [[0, 1]] * (shape.num_layers - 1)
    config = {"depth": 3, "top_k": top_k, "expert_pool": pool}
    done = served.complete(routing_config=config, **LENGTH)["routing"]
    assert done["top_k"] == top_k
    assert done["name"].startswith("L3-k1x1,2x")
    assert served.complete(routing_config=done, **LENGTH)["routing"] == done
    assert served.complete(model=f"tiny@{done['name']}", **LENGTH)["routing"] == done
    error = served.refused(400, routing_config={**done, "top_k": 1})
    assert "beside other values must mean the same" in error["message"]


def test_an_absent_part_is_the_models_full_value(served: Running) -> None:
    for config in ({}, {"top_k": None, "depth": None}):
        assert served.complete(routing_config=config, **LENGTH)["routing"]["name"] == "full"
    assert served.complete(routing_config={"depth": 2}, **LENGTH)["routing"]["name"] == "L2"


def test_a_remote_clients_configuration_loads_unchanged(served: Running) -> None:
    shape = served.engine.shape
    config = ElasticRoutingConfig.full(
        max_depth=shape.num_layers, active_layers=[0, 1], routing_top_k=2, sparsity_threshold=0.5
    )
    body = config.model_dump(by_alias=True)
    done = served.complete(routing_config=body, model="ernie-5.1-prod", **LENGTH)
    assert done["routing"]["name"] == config.resolve(shape).name
    assert done["model"] == "ernie-5.1-prod"
    assert done["routing"]["model"] == "tiny"


def test_a_name_may_carry_the_sub_network(served: Running) -> None:
    done = served.complete(model="ernie-5.1-prod@L2-k1", **LENGTH)
    assert (done["model"], done["routing"]["name"]) == ("ernie-5.1-prod@L2-k1", "L2-k1")
    both = {"depth": 2, "top_k": 1}
    assert (
        served.complete(model="tiny@L2-k1", routing_config=both, **LENGTH)["routing"]["depth"] == 2
    )
    assert (
        "L2-k1" in served.refused(400, model="tiny@L2-k1", routing_config={"depth": 2})["message"]
    )


@pytest.mark.parametrize(
    ("config", "reported"),
    [
        ({"depth": 0}, "depth must be an integer in [1, "),
        ({"depth": 99}, "got 99"),
        ({"depth": True}, "routing_config.depth"),
        ({"top_k": 9}, "top_k must be an integer in [1, "),
        ({"sparsity": 1.5}, "1.5"),
        ({"sparsity": float("nan")}, "nan"),
        ({"max_depth": 48}, "48"),
        ({"experts": 2}, "unknown key 'routing_config.experts'"),
        ({"top_k": 2, "topK": 2}, "top_k and topK are both given"),
        ({"routing_top_k": 2, "topK": 2}, "both given"),
        ({"depth": 2, "active_layers": [0]}, "depth and active_layers are both given"),
        ({"fallback_strategy": "pray"}, "fallback_strategy"),
        ([1], "routing_config"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    served: Running, config: Any, reported: str
) -> None:
    error = served.refused(400, routing_config=config)
    assert reported in error["message"]
    assert error["param"].startswith("routing_config")


def test_names_that_are_not_there(served: Running) -> None:
    error = served.refused(404, model="gpt-4o")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny, ernie-5.1-prod" in error["message"]
    assert served.refused(400, model="tiny@L99")["code"] == "invalid_routing"


def test_a_servers_own_sub_network_is_for_those_that_ask_for_none(start: Any) -> None:
    own = start({"routing": "L3-k2"})
    assert own.complete(**LENGTH)["routing"]["name"] == "L3-k2"
    assert own.complete(routing_config={}, **LENGTH)["routing"]["name"] == "full"
    assert own.complete(model="tiny@k1", **LENGTH)["routing"]["name"] == "k1"
