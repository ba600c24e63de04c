"""The command line in this process, and a tiny model in every state."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from bitlab_hf import BitLabConfig, save
from bitlab_hf.cli.app import app, main

DEMO = Path(__file__).parents[3] / "bitlab_hf/demo/model"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    error: BaseException | None

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli() -> Iterator[Callable[..., Done]]:
    """Runs a command; other libraries' logging is put back afterwards."""
    verbosity = transformers_logging.get_verbosity()
    others = [logging.getLogger(name) for name in ("accelerate", "bitsandbytes", "huggingface_hub")]
    levels = [other.level for other in others]

    def run(*arguments: object, text: str | None = None) -> Done:
        result = CliRunner().invoke(app, [str(item) for item in arguments], input=text)
        error = None if isinstance(result.exception, SystemExit) else result.exception
        return Done(result.exit_code, result.stdout, result.stderr, error)

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    for other, level in zip(others, levels, strict=True):
        other.setLevel(level)


@pytest.fixture
def bitlab(
    cli: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs ``bitlab`` as its process does, to the exit code and all that was printed."""

    def run(*arguments: object, text: str = "") -> Done:
        monkeypatch.setattr("sys.argv", ["bitlab", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capfd.readouterr(), None)

    return run


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's model float, latent and deployed (untrained)."""
    folder = tmp_path_factory.mktemp("states")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for name, config in (("latent", BitLabConfig()), ("deployed", BitLabConfig(mode="infer"))):
        model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config)
        save(model, folder / name, tokenizer=tokenizer)
    return {"float": DEMO, "latent": folder / "latent", "deployed": folder / "deployed"}
