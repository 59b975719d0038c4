"""`tritium serve`: a model behind the OpenAI protocol. This process never loads torch; the engine's own does."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tritium.build_child import build_in_child
from tritium.cli.options import fields_of
from tritium.cli.report import print_json, say, say_config
from tritium.config import BuildConfig, RuntimeConfig, ServerConfig, default_api_key
from tritium.engine.obtain import obtain_engine
from tritium.server.serve import serve
from tritium.server.service import Service


def run(*, model: str, config: Mapping[str, Any], server: Mapping[str, Any], is_json: bool) -> None:
    """Build the engine on first use, in a child process; serve it until SIGTERM or Ctrl-C."""
    api_key = server.get("api_key") or default_api_key()
    server_config = ServerConfig(**{**server, "api_key": api_key})
    build = BuildConfig(**fields_of(BuildConfig, config))
    runtime = RuntimeConfig(**fields_of(RuntimeConfig, config))
    engine = obtain_engine(model, build, build_in_child)

    def say_ready(service: Service, url: str) -> None:
        about = {
            "url": url,
            "model": service.model_name,
            "engine": str(engine),
            "dtype": service.manifest.dtype,
            **asdict(runtime),
            **service.client.limits,
            **asdict(server_config),
            "api_key": "set" if api_key else None,
        }
        say_config({name: value for name, value in about.items() if value not in (None, "")}, is_json=is_json)
        if is_json:
            print_json({"config": about})
        say(f"serving {service.model_name} at {url}/v1")

    asyncio.run(serve(engine, runtime, server_config, say_ready))
