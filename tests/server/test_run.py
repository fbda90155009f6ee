"""The serving process: draining, the engine's death, the command line."""

from __future__ import annotations

import asyncio

import httpx
import pytest
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
