"""The report of a run: what its page holds, and what a damaged run says."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bitcore.errors import ArgumentError, CheckpointError, MissingExtraError
from bitlab_hf import BitLabConfig
from bitlab_hf.report import read_run, render
from bitlab_hf.report.page import number, percent, recipe_name, summary
from bitlab_hf.report.plots import kinds, short_names
from bitlab_hf.report.vega import COLOURS, MOST_POINTS, Line, line_plot, row_plot, scripts
from bitlab_hf.train import RECIPES, TernaryStatistics, record_baseline
from bitlab_hf.train.baseline import BASELINE_FILE, read_baseline
from bitlab_hf.train.statistics_files import HISTOGRAMS_FILE, STATISTICS_FILE
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.report.made import BINS, KINDS, layer_names, make_run
from tests.bitlab_hf.report.parsed import Page

Cli = Callable[..., Any]


def assert_complete(page: Page, blocks: int, logs: int) -> None:
    """Every plot of a made-up run, with all of its points."""
    assert list(page.plots) == [
        "loss", "perplexity", "layers", "codes", "flips", "scales", "saturation", "weights",
    ]  # fmt: skip
    assert page.ids >= set(page.plots)
    assert len(page.heads) == 8
    plots = page.plots
    assert plots["loss"].lines == {"loss": logs}
    assert plots["perplexity"].lines == {"ternary": logs // 4 + 1}
    assert plots["perplexity"].levels == 1
    names = [name.removeprefix("model.layers.") for name in layer_names(blocks)]
    assert plots["layers"].rows == dict.fromkeys(names, logs)
    assert plots["layers"].bars == 3 * len(names)
    assert plots["codes"].lines == dict.fromkeys(("-1", "0", "+1"), logs)
    of_kinds = dict.fromkeys((kind.rpartition(".")[2] for kind in KINDS), logs)
    assert plots["scales"].lines == plots["saturation"].lines == of_kinds
    assert plots["flips"].lines == of_kinds
    panels = plots["weights"].panels
    assert list(panels) == ["step 0", f"step {5 * logs}"]
    assert all(40 <= count <= BINS for count in panels.values())


def test_page(tmp_path: Path) -> None:
    html = render(read_run(make_run(tmp_path)))
    page = Page(html)
    assert_complete(page, 2, 12)
    assert "12,288" in page.text  # tokens
    assert "recipe: distill" in page.text
    assert "perplexity" in page.text
    assert f"{math.exp(2.2):.3g}" in page.text
    assert f"full precision: {math.exp(2.0):.3g}" in page.text
    assert "0.200 nats" in page.text
    # Nothing is fetched: no address at all, and a policy that would refuse it.
    assert page.addresses == []
    assert not page.tags & {"link", "img", "iframe", "object", "base"}
    assert "default-src 'none'" in html
    assert "unsafe-eval" not in html
    assert "http" not in html.replace(scripts(), "").replace("http-equiv", "")
    assert "url(" not in html.replace(scripts(), "")
    kept = [script for script in page.scripts if script.get("type") != "application/json"]
    assert kept == [{}]


def test_every_text_is_escaped(tmp_path: Path) -> None:
    bad = "</title></script><script>alert(1)</script><img src=x onerror=y>'\"&"
    make_run(tmp_path, name=bad)
    path = tmp_path / STATISTICS_FILE
    header, *lines = path.read_text().splitlines()
    fields = json.loads(header)
    fields["layers"] = [f"{name}{bad}" for name in fields["layers"]]
    fields["facts"]["scheme"] = {bad: bad}
    path.write_text("\n".join([json.dumps(fields), *lines]) + "\n")
    (tmp_path / BASELINE_FILE).write_text(json.dumps({"version": 1, "nats": 2.0, "name": bad}))
    html = render(read_run(tmp_path))
    page = Page(html)
    assert "alert(1)</script" not in html
    assert "<img" not in html.replace(scripts(), "")
    assert bad in page.text
    assert len(page.scripts) == 1 + 8
    # What the plots are drawn from is whole JSON, with the names as they are.
    assert bad in page.specs["perplexity"]["encoding"]["color"]["scale"]["domain"]
    assert all(name.endswith(bad) for name in page.plots["layers"].rows)


def test_scripts_end_where_the_page_says() -> None:
    assert "</script" not in scripts().lower()
    assert "<!--" not in scripts()


def test_missing_package(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    scripts.cache_clear()
    done = cli("report", run)
    assert done.code == 1
    assert isinstance(done.error, MissingExtraError)
    assert 'pip install ".[report]"' in str(done.error)
    assert not (run / "report.html").exists()


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    make_run(tmp_path, baseline=False)
    (tmp_path / HISTOGRAMS_FILE).unlink()
    (tmp_path / "bitlab_recipe.json").unlink()
    (tmp_path / "trainer_state.json").unlink()
    path = tmp_path / STATISTICS_FILE
    kept = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "eval_loss" not in entry.get("logs", {}):
            kept.append(json.dumps({**entry, "flipped": [None] * 6} if "zero" in entry else entry))
    path.write_text("\n".join(kept) + "\n")
    page = Page(render(read_run(tmp_path)))
    assert list(page.plots) == ["loss", "layers", "scales", "saturation"]
    assert page.plots["layers"].rows == {
        name.removeprefix("model.layers."): 0 for name in layer_names(2)
    }
    assert "never evaluated" in page.text
    assert "took no histograms" in page.text
    assert "a plain Trainer" in page.text
    assert "not counted" in page.text


def test_newest_whole_checkpoint(tmp_path: Path) -> None:
    make_run(tmp_path)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").unlink()
    for step, text in ((40, json.dumps({**state, "global_step": 40})), (60, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(text)
    run = read_run(tmp_path)
    # The statistics go on after the last whole checkpoint.
    assert (run.steps, run.max_steps, run.tokens) == (60, 60, 12_288)
    assert run.logs[-1][0] == 60


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="run must be a folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match=r"no run of a Trainer .*\n.*TernaryStatistics"):
        read_run(tmp_path)
    inner = make_run(tmp_path / "run")
    with pytest.raises(ArgumentError, match=f"There is one in {inner}"):
        read_run(tmp_path)
    path = inner / STATISTICS_FILE
    whole = path.read_text()
    path.unlink()
    with pytest.raises(ArgumentError, match="no statistics in"):
        read_run(inner)
    path.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(ArgumentError, match="must have logged at least once"):
        read_run(inner)
    for old, new in (
        ('"zero": [', '"zero": ["x", '),
        ('"zero": [', '"zero": ["many", '),
        ('"logs": {', '"logs": 3, "other": {'),
        ('"facts": {', '"facts": 3, "other": {'),
    ):
        path.write_text(whole.replace(old, new))
        with pytest.raises(CheckpointError, match=STATISTICS_FILE):
            read_run(inner)
    path.write_text(whole)
    for name in ("trainer_state.json", HISTOGRAMS_FILE, BASELINE_FILE, "bitlab_recipe.json"):
        content = (inner / name).read_text()
        for damaged in (content[: len(content) // 2], "[]", '{"version": 1, "snapshots": [{}]}'):
            if name == "bitlab_recipe.json" and damaged.startswith("{"):
                continue
            (inner / name).write_text(damaged)
            with pytest.raises(CheckpointError, match=name):
                read_run(inner)
        (inner / name).write_text(content)
    read_run(inner)


def test_command(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, baseline=False)
    done = cli("report", run, "--baseline", "8", "--json")
    assert done.code == 0, done.error
    assert done.json["output"] == str(run / "report.html")
    assert done.json["gap_nats"] == pytest.approx(2.2 - math.log(8))
    assert done.json["steps"] == 60
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "perplexity 9.025" in cli("report", run, "--out", tmp_path / "new/page.html").out
    assert cli("report", run, "--baseline", "0.5").code == 2
    assert isinstance(cli("report", tmp_path / "new").error, ArgumentError)
    # A full disk leaves the old page.
    before = (run / "report.html").read_text()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli("report", run).code == 1
    assert (run / "report.html").read_text() == before
    assert not list(run.glob(".*"))


def test_a_real_run(tmp_path: Path) -> None:
    """Two steps of a Trainer: the page's facts and figures are the Trainer's own."""
    source = make_float_model("llama", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    original = AutoModelForCausalLM.from_pretrained(source)
    data = training_data()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        eval_strategy="steps", eval_steps=1, include_num_input_tokens_seen=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:3])
    TernaryStatistics(histograms=2).attach(trainer)
    nats = record_baseline(trainer, original, "the original")
    original.eval()
    losses = [original(**{k: v[None] for k, v in one.items()}).loss.item() for one in data[:3]]
    assert nats == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert read_baseline(tmp_path / "run") == (nats, "the original")
    trainer.train()
    trainer.save_state()
    run = read_run(tmp_path / "run")
    found = summary(run)
    assert found["loss"] == pytest.approx(trainer.state.log_history[-3]["loss"], rel=1e-5)
    assert found["gap_nats"] == pytest.approx(
        trainer.state.log_history[-2]["eval_loss"] - nats, abs=1e-4
    )
    assert (run.steps, run.max_steps) == (2, 2)
    assert run.tokens == 4 * data[0]["input_ids"].numel()
    assert run.facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert run.facts["arguments"]["lr_scheduler_type"] == "linear"
    assert run.facts["scheme"]["weight_quantizer"] == "absmean"
    assert str(tmp_path) not in json.dumps(run.facts)
    page = Page(render(run))
    assert len(page.plots) == 8
    assert page.plots["perplexity"].lines == {"ternary": 2}
    # Of a Trainer that is not BitLab's, too, a second run in the folder is told alone.
    arguments.max_steps = 1
    again = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:3])
    TernaryStatistics(histograms=2).attach(again)
    again.train()
    assert (read_run(tmp_path / "run").steps, read_run(tmp_path / "run").max_steps) == (1, 1)
    trainer.eval_dataset = {"one": data[:3]}
    with pytest.raises(ArgumentError, match="must have one eval_dataset, got a dict of one"):
        record_baseline(trainer, original)
    trainer.eval_dataset = None
    with pytest.raises(ArgumentError, match="must have an eval_dataset"):
        record_baseline(trainer, original)


def test_numbers() -> None:
    written = [number(value) for value in (0, 12_345.6, 0.12345, 5e-7)]
    assert written == ["0", "12,346", "0.123", "5e-07"]
    assert percent(0.1234) == "12.3 %"


def test_lines() -> None:
    lines = [Line("a", COLOURS[0], [(0, 2.0), (10, 8.0)]), Line("b", COLOURS[1], [(5, 4.0)])]
    spec = line_plot("title", lines, 10, log=True, level=("c", 1.0))
    assert spec["data"]["values"] == [
        {"step": 0, "y0": 2.0, "y2": 1.0},
        {"step": 5, "y1": 4.0, "y2": 1.0},
        {"step": 10, "y0": 8.0, "y2": 1.0},
    ]
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    assert 0 < low < 1 < 8 < high
    assert spec["encoding"]["x"]["scale"]["domain"] == [0, 10]
    assert spec["encoding"]["color"]["scale"] == {
        "domain": ["a", "b", "c"], "range": [*COLOURS[:2], "var(--ink)"],
    }  # fmt: skip
    # A single point is no line, so it is marked.
    assert [bool(layer["mark"]["point"]) for layer in spec["layer"][:2]] == [False, True]
    shown = [one["field"] for one in spec["layer"][-1]["encoding"]["tooltip"]]
    assert shown == ["step", "y0", "y1", "y2"]


@pytest.mark.parametrize(
    ("steps", "starts"), [([7], [0]), ([10, 20, 23], [0, 10, 20]), ([100, 110], [90, 100])]
)
def test_columns_begin_where_the_last_ended(steps: list[int], starts: list[int]) -> None:
    cells = [[0.0, None, 0.2][: len(steps)]]
    spec = row_plot("title", ["a"], steps, cells, [[0.3, 0.4, 0.3]], ("map", "bars"))
    heat = spec["hconcat"][0]
    assert heat["data"]["values"] == [{"row": "a", "share": cells[0]}]
    written = {one.get("as"): one.get("calculate") for one in heat["transform"]}
    assert written["start"] == f"{starts}[datum.column - 1]"
    assert written["step"] == f"{steps}[datum.column - 1]"
    low, high = heat["encoding"]["color"]["scale"]["domain"]
    assert 0 < low < high


def test_long_runs_are_thinned() -> None:
    line = Line("a", COLOURS[0], [(float(n), float(n % 2)) for n in range(5000)])
    assert MOST_POINTS / 2 < len(line.drawn()) <= MOST_POINTS
    assert line.drawn()[3][1] == pytest.approx(0.5, abs=0.1)


def test_names() -> None:
    assert short_names(["a.0.q", "a.1.q"]) == ["0.q", "1.q"]
    assert short_names(["q"]) == ["q"]
    assert kinds(["a.q", "a.k", "b.q"]) == {"q": [0, 2], "k": [1]}
    many = kinds([f"l.{n}" for n in range(9)])
    assert len(many) == 7
    assert sorted(place for places in many.values() for place in places) == list(range(9))
    assert recipe_name(RECIPES["plain"].to_dict()) == "plain"
    assert recipe_name({**RECIPES["plain"].to_dict(), "temperature": 3.0}) == "temperature=3.0"
