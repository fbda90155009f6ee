"""Metrics: every fact the engine reports moves a series, under vLLM's names where it has one."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from server import memory
from server.engine.recorder import RequestTimes
from server.metrics import Metrics

VLLM_NAMES = (
    "num_requests_running num_requests_waiting time_to_first_token_seconds inter_token_latency_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "prompt_tokens prompt_tokens_cached generation_tokens request_success num_preemptions"
).split(" ")


def values(metrics: Metrics) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if "le" not in sample.labels and not sample.name.endswith("_created")
    }


def report_everything(recorder: Metrics) -> None:
    recorder.running(1, 2, 3)
    recorder.step(0.1, 4, 5)
    recorder.prefill_progress(6, 7)
    recorder.prompt(8, 9)
    recorder.first_token(0.2)
    recorder.inter_token(0.3)
    recorder.ended("stop", 10, RequestTimes(0.1, 0.2, 0.3, 0.4))
    recorder.preemption()
    recorder.index_build("flat", 0.5, 11)
    recorder.index_builds_pending(3)
    recorder.compaction(2, 20, 0.7)
    recorder.disk("read", 23, 0.8)
    recorder.attention(0.6, 12, 13, 14)
    recorder.live_recall(0.9, 0.99)
    recorder.memory("host", "kv", 15)
    recorder.memory("host", "index", 15)
    recorder.memory("host", "staging", 15)
    recorder.memory("host", "step", 15)
    recorder.memory_budget("host", 20, 21)
    recorder.segments("host", 16)
    recorder.sessions({"ready": 18}, 19)
    recorder.eviction("host", "budget", 17)
    recorder.degraded("no core")
    recorder.process_base(22, 23)


def test_metrics_follow_vllms_names() -> None:
    names = {family.name for family in text_string_to_metric_families(Metrics().render().decode())}
    assert {f"retrieval_{name}" for name in VLLM_NAMES} <= names


def test_every_report_moves_its_series() -> None:
    metrics = Metrics()
    before = values(metrics)
    report_everything(metrics)
    after = values(metrics)
    unmoved = {name for name, value in after.items() if value == before.get(name, 0.0)}
    other_labels = {name for name in unmoved if "{" in name or name == "retrieval_process_resident_bytes"}
    assert unmoved == other_labels
    assert after["retrieval_request_success_total{stop}"] == 1
    assert after["retrieval_memory_bytes{kv}{host}"] == 15
    assert after["retrieval_generation_tokens_total"] == 10


def test_phases_a_request_never_reached_are_not_counted() -> None:
    metrics = Metrics()
    metrics.ended("error", 0, RequestTimes(None, None, None, 0.1))
    after = values(metrics)
    assert after["retrieval_request_queue_time_seconds_count"] == 0
    assert after["retrieval_e2e_request_latency_seconds_count"] == 1


def test_instances_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.preemption()
    assert values(second)["retrieval_num_preemptions_total"] == 0


def test_long_prefills_fit_the_buckets() -> None:
    metrics = Metrics()
    metrics.first_token(3600.0)
    buckets = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == "retrieval_time_to_first_token_seconds_bucket"
    }
    assert buckets["5120.0"] == 1


def test_degraded_path_is_logged_once(caplog) -> None:  # type: ignore[no-untyped-def]
    metrics = Metrics()
    for _ in range(3):
        metrics.degraded("no core")
    assert [record.getMessage() for record in caplog.records] == ["degraded: no core"]
    assert values(metrics)["retrieval_degraded_total{no core}"] == 3


def test_what_the_heap_has_grown_by_is_looked_at_when_it_is_asked_for() -> None:
    metrics = Metrics()
    name = "retrieval_memory_bytes{heap}{host}"
    assert values(metrics)[name] == 0
    memory.trim()
    metrics.process_base(1, 0)
    blocks = [bytearray(b"x") * 100_000 for _ in range(300)]
    assert values(metrics)[name] >= 0.9 * sum(map(len, blocks))
