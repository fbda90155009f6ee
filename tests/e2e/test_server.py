"""The way of a user: start the server, ask over HTTP, look at the metrics, stop it."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from typing import Any

import pytest
from openai import APIError, OpenAI

QUESTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\nThe grass is green. The sky is blue. "
    "One of the special magic numbers for quiet-harbor is: 4071852. "
    "The sun is yellow. Here we go. There and back again."
)


def metrics(server: Any) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_bundled_model_finds_the_number_through_the_sdk(server):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "system", "content": QUESTION},
            {"role": "user", "content": "What is the special magic number for quiet-harbor mentioned in the text?"},
        ],
        temperature=0,
        max_tokens=60,
    )
    assert "4071852" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_2"])
def test_needles_are_found_through_the_index(task, server, run_script):
    base = f"{server.url}/v1"
    done = run_script(
        "scripts/needle.py",
        "--base-url",
        base,
        "--tokens",
        "6000",
        "--needles",
        "6",
        "--task",
        task,
        "--document-first",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["needles"] == 6
    assert summary["accuracy"] >= 5 / 6
    assert 0 < summary["share_scanned"] < 0.9
    assert summary["ttft_seconds"] < summary["cold_prefill_seconds"]


def test_clients_that_come_and_go_leave_nothing_behind(server, run_script):
    done = run_script(
        "scripts/bench/load.py", "--base-url", f"{server.url}/v1", "--clients", "16", "--longest", "2000",
        "--max-tokens", "32", "--timeout", "300",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["finished"], summary["disconnected"], summary["hung"], summary["leaked"]) == (12, 4, 0, {})
    assert metrics(server)['retrieval_request_success_total{finished_reason="abort"}'] >= 1


def test_metrics_move(server):
    """After the tests above: every family that a CPU server without failures can move has moved."""
    values = metrics(server)
    for name in (
        "retrieval_prompt_tokens_total",
        "retrieval_prompt_tokens_cached_total",
        "retrieval_generation_tokens_total",
        "retrieval_time_to_first_token_seconds_count",
        "retrieval_inter_token_latency_seconds_count",
        "retrieval_e2e_request_latency_seconds_count",
        "retrieval_request_queue_time_seconds_count",
        "retrieval_request_prefill_time_seconds_count",
        "retrieval_request_decode_time_seconds_count",
        "retrieval_attention_layer_seconds_count",
        "retrieval_keys_visible_total",
        "retrieval_keys_scored_total",
        "retrieval_keys_retrieved_total",
        "retrieval_live_recall_count",
        "retrieval_process_base_bytes",
        'retrieval_memory_bytes{content="kv",tier="host"}',
        'retrieval_memory_bytes{content="index",tier="host"}',
        'retrieval_segments{tier="host"}',
    ):
        assert values[name] > 0, name


def test_log_tells_who_called_what_but_no_prompt(server):
    """After the tests above."""
    log = server.log.read_text()
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in log
    assert not any(word in log for word in ("quiet-harbor", "special magic", "4071852"))


def test_termination_drains_streams_and_exits_with_zero(start_server):
    server = start_server("--drain-timeout", "60")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=200,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    codes: list[int] = []
    stopper = threading.Thread(target=lambda: codes.append(server.stop(signal.SIGTERM)))
    stopper.start()
    reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason]
    stopper.join()
    assert reasons == ["length"]
    assert codes == [0]


DIES_AT_THE_FIFTH_TOKEN = """
import sys
from server.__main__ import main
from server.engine.worker import Worker

step = Worker.step

def dying(self):
    step(self)
    if any(sequence.num_generated >= 5 for sequence in self.scheduler.running):
        raise RuntimeError("planted")

Worker.step = dying
sys.exit(main(sys.argv[1:]))
"""


def test_dead_engine_ends_streams_turns_health_and_then_the_process(start_server):
    server = start_server(program=("-c", DIES_AT_THE_FIFTH_TOKEN))
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=50, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    with pytest.raises(APIError) as ended:
        list(stream)
    assert "planted" not in str(ended.value)
    with pytest.raises(urllib.error.HTTPError) as unhealthy:
        urllib.request.urlopen(f"{server.url}/health")
    assert (unhealthy.value.code, json.load(unhealthy.value)["error"]["code"]) == (503, "engine_dead")
    assert server.process.wait(60) == 1
