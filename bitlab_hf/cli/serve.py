"""``bitlab serve``: an OpenAI server, vLLM's where it is installed, else transformers'."""

from __future__ import annotations

import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from bitcore.errors import ArgumentError, MissingExtraError
from bitlab_hf.cli.common import Json, Source, emit, quiet
from bitlab_hf.cli.loading import check_source, read_scheme

_VLLM, _TRANSFORMERS = "vLLM", "transformers"
_FRAGILE = (
    "serve: with --continuous-batching, an empty prompt, or one that the cache cannot hold, ends "
    "the worker: later requests get status 503 until the server is started again."
)


def serve(
    source: Source,
    options: Annotated[
        list[str] | None,
        typer.Argument(help="Options of the server itself, after --.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    vllm: Annotated[
        Path | None,
        typer.Option(
            help="vLLM's virtual environment, as scripts/vllm_environment.sh makes it. Default: "
            "this one, if it has vLLM."
        ),
    ] = None,
    with_transformers: Annotated[
        bool, typer.Option("--with-transformers", help="Take `transformers serve` in any case.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Serves a model with the OpenAI interface: by vLLM where it is installed, else transformers.

    The server takes this command's place; Ctrl-C ends it.
    """
    quiet()
    check_source(source)
    if vllm is not None and with_transformers:
        raise ArgumentError("serve: --vllm must be left out with --with-transformers, got both")
    python = None if with_transformers else _vllm_python(vllm)
    _check_port(host, port)
    given = options or []
    if python is None:
        name, command = _TRANSFORMERS, _transformers_command(source)
        if _batches(given):
            typer.echo(_FRAGILE, err=True)
    else:
        _check_vllm_serves(source)
        # Without -P, Python would look here first: in a clone, at BitLab without its libraries.
        name, command = _VLLM, [python, "-P", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", source, *_dtype(source, given)]
    command += ["--host", host, "--port", str(port), *given]
    address = f"http://{host}:{port}/v1"
    found = {"server": name, "address": address, "command": command}
    emit(found, as_json, f"{source}: served by {name} at {address}, model name {source}")
    sys.stdout.flush()
    # Nothing of the model is told to vLLM's makers unless the user wants it.
    os.execve(command[0], command, {"VLLM_NO_USAGE_STATS": "1", **os.environ})


def _vllm_python(environment: Path | None) -> str | None:
    """Returns the Python that has vLLM, or None."""
    if environment is None:
        return sys.executable if find_spec("vllm") else None
    python = environment / "bin/python"
    for module, name in (("vllm", "vLLM"), ("bitlab_vllm", "BitLab's plugin")):
        if not python.exists() or not list(environment.glob(f"lib/python*/site-packages/{module}")):
            raise ArgumentError(
                f"serve: --vllm must be a virtual environment with {name}, got {environment}\n"
                "Make it: scripts/vllm_environment.sh FOLDER."
            )
    return str(python.absolute())


def _transformers_command(source: str) -> list[str]:
    if not (find_spec("fastapi") and find_spec("uvicorn")):
        raise MissingExtraError(
            "serve: vLLM or transformers' server must be installed, got neither\n"
            "Run `pip install 'transformers[serving]'`, or see docs/serving.md for vLLM."
        )
    return [str(Path(sys.executable).with_name("transformers")), "serve", source]


def _batches(given: list[str]) -> bool:
    """Tells whether options of ``transformers serve`` switch continuous batching on."""
    switches = [
        one for one in given if one in ("--continuous-batching", "--no-continuous-batching")
    ]
    return switches[-1:] == ["--continuous-batching"]


def _check_vllm_serves(source: str) -> None:
    """Refuses what the plugin would refuse, before a server has been started for it."""
    from bitlab_hf.config import QUANT_METHOD
    from bitlab_vllm.scheme import Scheme

    scheme = read_scheme(source)
    if scheme is not None and scheme["quant_method"] == QUANT_METHOD:
        Scheme.from_dict(scheme)


def _dtype(source: str, given: list[str]) -> list[str]:
    """Returns the option without which vLLM rounds a float32 model to bfloat16."""
    from transformers import AutoConfig

    if any(one.split("=")[0] == "--dtype" for one in given):
        return []
    held: Any = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype
    return ["--dtype", "float32"] if str(held).endswith("float32") else []


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the servers do: a connection that lingers holds no port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ArgumentError(
            f"serve: --host and --port must be free to listen on, got {host}:{port}: "
            f"{error.strerror}\nChoose another port: --port {port % 65535 + 1}."
        ) from error
