"""The runs that docs/benchmarks.md shows: a file each in docs/benchmarks, and how it gets there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

Result = dict[str, Any]
# Options that name a place on the machine that measured.
_PLACES = re.compile(r" --(?:json|work|out|output|folder|models|png) \S+")
# Of what has to be named, such as a model, the name is enough.
_PARENTS = re.compile(r"(?<= )/\S*/(?=\S)")
# Parts of scripts/gpu.sh that the page shows, and their kinds.
_PARTS = {
    "train": "train", "compiled": "train", "generate": "generate", "kernels": "cuda",
    "experts": "experts", "quality": "quality",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a command found, once.

    Attributes:
        name: Of its file.
        label: Its machine, in two or three words.
        kind: What measured: ``linear``, ``groups``, ``generate``, ``train``, ``cuda``, ...
        machine: Its machine and versions.
        date: Of the day, as ISO has it.
        command: What was run.
        conditions: What else has to be known.
        source: How the figures came into the file.
        result: The figures, by the names that the command gives them.
    """

    name: str
    label: str
    kind: str
    machine: str
    date: str
    command: str
    conditions: str
    source: str
    result: Result

    @property
    def on_gpu(self) -> bool:
        """Whether it is of a GPU."""
        return self.kind == "cuda" or self.result.get("device") == "cuda"

    def section(self) -> str:
        """Returns where, when and how it was, under a heading that tables lead to."""
        told = [
            f"`{self.command}`, {self.date}.",
            *(f"{text[0].upper()}{text[1:]}." for text in (self.machine, self.conditions) if text),
            f"[Its figures](benchmarks/{self.name}.json) are {self.source}.",
        ]
        return f"### {self.name}\n\n" + "\n".join(told)


def load_runs(folder: Path) -> list[Run]:
    """Returns all runs, by name.

    Raises:
        SystemExit: A file lacks something, or says more.
    """
    runs = []
    wanted = {field.name for field in fields(Run)} - {"name"}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        found = json.loads(path.read_text())
        if set(found) != wanted:
            raise SystemExit(f"{path.name}: must have {sorted(wanted)}, got {sorted(found)}")
        runs.append(Run(name=path.stem, **found))
    return runs


def compact(value: Any, indent: str = "") -> str:
    """Returns JSON with a record a line."""
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(flat) <= 100 or not value:
        return flat
    inner = indent + " "
    if isinstance(value, list):
        items = [f"{inner}{json.dumps(one, ensure_ascii=False)}" for one in value]
    else:
        items = [f"{inner}{json.dumps(key)}: {compact(one, inner)}" for key, one in value.items()]
    ends = "[]" if isinstance(value, list) else "{}"
    return f"{ends[0]}\n" + ",\n".join(items) + f"\n{indent}{ends[1]}"


def write_run(folder: Path, run: Run) -> Path:
    """Writes a run's file."""
    path = folder / f"{run.name}.json"
    beside = path.with_suffix(".new")
    values = {field.name: getattr(run, field.name) for field in fields(Run) if field.name != "name"}
    beside.write_text(compact(values) + "\n")
    beside.replace(path)
    return path


def _significant(value: Any) -> Any:
    """Returns the same with floats of five digits, which are more than a run repeats."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_significant(one) for one in value]
    if isinstance(value, dict):
        return {key: _significant(one) for key, one in value.items()}
    return value


def _in_units(row: Result, unit: str, size: float) -> Result:
    """Returns a record with its bytes in a larger unit."""
    return {
        (f"{key.removesuffix('_bytes')}_{unit}" if key.endswith("_bytes") else key):
        value / size if key.endswith("_bytes") and value is not None else value
        for key, value in row.items()
    }  # fmt: skip


def figures(kind: str, result: Result) -> Result:
    """Returns what the page needs of a command's result, in the page's units."""
    names = ("device", "prompt", "threads", "compiled", "targets")
    kept = {key: result[key] for key in names if key in result}
    if kind.startswith(("generate", "experts_model", "load")):
        engines = [_in_units(one, "gb", 1e9) for one in result["engines"]]
        kept["engines"] = [{k: v for k, v in one.items() if k != "runs"} for one in engines]
        kept |= {"geometry": result["geometry"]} if kind.startswith("load") else {}
    elif kind == "train":
        rows = []
        for row in result["rows"]:
            found = row["bytes"] and {name: value / 1e6 for name, value in row["bytes"].items()}
            rows.append({**{k: v for k, v in row.items() if k != "bytes"}, "bytes_mb": found})
        kept["rows"] = rows
    elif kind.startswith("serve"):
        # The texts that were compared are long; the counts are what came of it.
        kept["rows"] = [_in_units(one, "gb", 1e9) for one in result["rows"]]
        kept |= {key: result["settings"][key] for key in ("threads", "tokens", "geometry")}
    elif kind == "lookup":
        kept |= {key: result[key] for key in ("rows", "model", "guesses", "tokens")}
    elif kind == "calibration":
        kept |= {key: result[key] for key in ("samples", "length")}
        kept["layers"] = [
            {
                **_in_units(one, "gb", 1e9),
                "above_gb": (one["peak_bytes"] - one["model_bytes"]) / 1e9,
                "whole_cpu_hours": one["cpu_seconds"] * one["layers"] / 3600,
            }
            for one in result["layers"].values()
        ]
    elif kind == "quality":
        kept["results"] = {
            name: [
                {k: v for k, v in one.items() if k not in ("scored", "settings")} for one in runs
            ]
            for name, runs in result["results"].items()
        }
    else:
        parts = ("rows", "head", "packing", "quantizers", "ceilings", "generate")
        kept |= {key: result[key] for key in parts if result.get(key)}
        if kind == "cuda":
            kept["device"] = "cuda"
    found: Result = _significant(kept)
    return found


# What a benchmark measures where no --geometry is given: another one is a run of its own.
_USUAL = {"serve": None, "generate": "2b", "load": "smollm2"}


def kind_of(command: str) -> str:
    """Returns what a benchmark's result is, by its command."""
    script = re.search(r"scripts/bench/(\w+)\.py", command)
    if script is None:
        raise SystemExit(f"page: the result must have a benchmark's command, got {command!r}")
    geometry = re.search(r"--geometry (\w+)", command)
    if script[1] in _USUAL and geometry and geometry[1] != _USUAL[script[1]]:
        return f"{script[1]}-{geometry[1]}"
    return "groups" if "--granularity" in command else script[1]


def run_of(name: str, label: str, machine: str, kind: str, result: Result) -> Run:
    """Returns a run out of what a benchmark wrote."""
    busy = result.get("disturbance")
    conditions = ""
    if busy is not None and result.get("device", "cpu") == "cpu":
        conditions = f"other processes took {100 * busy['other_processes']:.1f} % of the CPU time"
        if kind.startswith("serve"):
            # Of a server that is ended, what its own processes took is not told.
            conditions += ", the servers' own processes perhaps among them"
    command = _PARENTS.sub("", _PLACES.sub("", result["command"]))
    source = "written by the command"
    return Run(
        name, label, kind, machine, result["date"], command, conditions, source,
        figures(kind, result),
    )  # fmt: skip


def words_of(machine: Result) -> str:
    """Returns a machine, as `bitlab_hf.cli.timing.machine` describes it, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return f"{machine['cores']} cores of {machine['cpu']}, {memory}; {versions}"


def runs_of(visit: Result) -> list[Run]:
    """Returns the runs in what scripts/gpu.sh wrote."""
    gpu = visit["gpu"]
    machine = f"{gpu}, CUDA {visit['cuda']}; {words_of(visit['machine'])}"
    short = gpu.removeprefix("NVIDIA ").split(":")[0]
    slug = re.sub(r"[^a-z0-9]+", "-", short.lower()).strip("-")
    runs = []
    for part, kind in _PARTS.items():
        found = visit["parts"].get(part, {}).get("result")
        if found is not None:
            # A quick visit without a GPU shows its tables too; they are of no measurement.
            on_gpu = {**found, "device": "cuda"}
            runs.append(run_of(f"gpu-{part}-{slug}", short, machine, kind, on_gpu))
    return runs


def take(path: Path, label: str | None, folder: Path) -> list[Path]:
    """Writes the files of a benchmark's result, or of scripts/gpu.sh's; returns them.

    Raises:
        SystemExit: It is of tiny shapes, or has no label where it needs one.
    """
    result = json.loads(path.read_text())
    if result.get("quick"):
        raise SystemExit(f"page: {path} must be a measurement, got one of --quick")
    if "parts" in result:
        return [write_run(folder, run) for run in runs_of(result)]
    if label is None:
        raise SystemExit("page: --label must name the machine in two or three words, got none")
    kind = kind_of(result["command"])
    name = re.sub(r"[^a-z0-9]+", "-", f"{kind}-{label}".lower()).strip("-")
    # bench/cuda.py says what its GPU is, and nothing of the machine around it.
    machine = words_of(result["machine"]) if "machine" in result else result["device"]
    return [write_run(folder, run_of(name, label, machine, kind, result))]
