"""The serving process: draining, the engine's death, the command line."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
import uvicorn

from server import run
from server.__main__ import main
from server.app import create_app
from server.config import Settings
from server.engine.events import Token
from server.engine.tokenizer import Tokenizer
from server.metrics import Metrics
from server.run import DrainingServer
from tests.server.fake_engine import FakeEngine


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of 127.0.0.1, by an authority that only `trust` knows."""

    key: Path
    chain: Path
    trust: ssl.SSLContext


def make_server(engine: FakeEngine, tokenizer: Tokenizer) -> DrainingServer:
    app = create_app(Settings(), engine, tokenizer, Metrics())
    return DrainingServer(uvicorn.Config(app, port=0, log_level="warning"), engine, drain_seconds=1.0)


async def port_of(server: DrainingServer) -> int:
    while not server.started:
        await asyncio.sleep(0.01)
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


async def test_end_of_the_server_drains_the_engine_and_ends_streams_with_an_error(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    x = 3 + ord("x") - ord("!")
    engine.script = lambda request: [Token(0, x)]
    server = make_server(engine, tokenizer)
    serving = asyncio.create_task(server.serve())
    url = f"http://127.0.0.1:{await port_of(server)}/v1/completions"
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", url, json={"prompt": "x", "stream": True}) as answer,
    ):
        lines = answer.aiter_lines()
        assert '"text":"x"' in await anext(lines)
        server.should_exit = True
        rest = [line async for line in lines]
    await serving
    assert "shutting_down" in "".join(rest)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert (engine.is_alive, server.exit_code) == (False, 0)


async def test_whoever_counts_memory_is_told_when_the_server_listens(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(Settings(), engine, tokenizer, Metrics())
    config = uvicorn.Config(app, port=0, log_level="warning")
    listening: list[bool] = []
    server = DrainingServer(config, engine, 0.1, lambda: listening.append(bool(server.servers[0].sockets)))
    serving = asyncio.create_task(server.serve())
    await port_of(server)
    server.should_exit = True
    await serving
    assert listening == [True]


async def test_dead_engine_ends_the_process_with_a_failure(
    engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "DEAD_ENGINE_SECONDS", 0.0)
    server = make_server(engine, tokenizer)
    serving = asyncio.create_task(server.serve())
    await port_of(server)
    engine.is_alive = False
    await serving
    assert server.exit_code == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for part in issued.cert_chain_pems:
        part.write_to_path(folder / "cert.pem", append=True)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return Certificate(folder / "key.pem", folder / "cert.pem", context)


async def test_tls_files_make_the_server_speak_https_only(
    engine: FakeEngine, tokenizer: Tokenizer, certificate: Certificate
) -> None:
    settings = Settings(port=0, ssl_keyfile=certificate.key, ssl_certfile=certificate.chain)
    app = create_app(settings, engine, tokenizer, Metrics())
    server = DrainingServer(run._uvicorn_config(settings, app), engine, drain_seconds=0.1)
    serving = asyncio.create_task(server.serve())
    port = await port_of(server)
    async with httpx.AsyncClient(verify=certificate.trust) as client:
        assert (await client.get(f"https://127.0.0.1:{port}/health")).status_code == 200
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://127.0.0.1:{port}/health")
    async with httpx.AsyncClient() as stranger:  # who does not know the authority
        with pytest.raises(httpx.ConnectError, match="certificate"):
            await stranger.get(f"https://127.0.0.1:{port}/health")
    server.should_exit = True
    await serving


def test_key_without_a_certificate_is_refused(certificate: Certificate, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--ssl-keyfile", str(certificate.key)]) == 2
    assert "ssl-certfile" in capsys.readouterr().err


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Config(LlamaConfig): pass\n"
    (tmp_path / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": [None, "evil.Config"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 1
    assert "cannot load" in caplog.text
    assert not ran.exists()


def test_help_explains_how_to_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "retrieval-server serve" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bake"]])
def test_unknown_command_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_wrong_setting_is_a_usage_error_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "many"]) == 2
    assert "port" in capsys.readouterr().err


def test_model_that_cannot_be_loaded_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["serve", "--model", "/nowhere/at/all", "--port", "0"]) == 1
    assert "cannot load" in caplog.text
