"""Commands that turn one folder into another, or send it: deploy, convert, import, export, push."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bitlab_hf.cli.common import (
    FloatSource,
    Json,
    Output,
    Source,
    emit,
    folder_bytes,
    library_bars,
    megabytes,
    progress,
    quiet,
)
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.gguf_source import as_folder
from bitlab_hf.cli.loading import (
    DAMAGED,
    check_source,
    check_unpacked,
    find_scheme,
    is_gguf,
    load_model,
    load_whole,
    tokenizer_if_any,
)
from bitlab_hf.cli.places import check_files, check_folder, check_output, check_output_file
from bitlab_hf.cli.scheme import config_of, load_packed, with_scheme

GroupScales = Annotated[
    str,
    typer.Option(
        help="Scales of groups: float32 as they are, or uint8 as 7-bit multipliers of one a row, "
        "smaller and faster."
    ),
]


@with_scheme
def deploy(
    source: FloatSource, output: Output, as_json: Json = False, *, scheme: dict[str, Any]
) -> None:
    """Packs a float or latent model into a deployed one, 2 bits a weight and its scales.

    A latent model keeps its own scheme. A float model that was not trained for it loses most of
    what it can: ternarizing is for after quantization-aware training.
    """
    from bitlab_hf import Facts, save
    from bitlab_hf.model.int8 import int8_modules

    quiet()
    check_output(source, output)
    held = check_unpacked(source, "deploy", "It is packed already.")
    config_of("deploy", scheme, held)
    started = time.perf_counter()
    with library_bars(), as_folder(source) as folder:
        model = load_packed("deploy", folder, scheme, held)
        # What was measured stays true where the weights were ternary and nothing becomes int8 now.
        same = held is not None and not int8_modules(model)
        facts = Facts.load(folder).handed_down(computes_same=same)
        with doing(f"writing {output}"):
            save(model, output, tokenizer=tokenizer_if_any(folder), facts=facts)
    _report("deployed", source, output, started, as_json)


def convert(
    source: Source,
    output: Output,
    keep_inexact: Annotated[
        bool, typer.Option("--keep-inexact", help="Leave layers that are not exact float.")
    ] = False,
    group_scale_dtype: GroupScales = "float32",
    as_json: Json = False,
) -> None:
    """Packs a float checkpoint whose weights are exactly ternary, without any loss.

    Every value is proven to come back as it was; a layer that is not exactly ternary is named.
    With --group-scale-dtype uint8, scales of groups are rounded, which is told.
    """
    from bitlab_hf import convert_ternary

    quiet()
    started = time.perf_counter()
    check_output(source, output)
    folder = Path(check_source(source))
    total = 2 * folder_bytes(folder) if folder.is_dir() else None
    with progress("converting", total) as advance, doing(f"converting {source}", DAMAGED, source):
        report = convert_ternary(
            source, output, keep_inexact=keep_inexact, group_scale_dtype=group_scale_dtype,
            advance=advance,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    kept = "".join(f"\nkept {key}: {why}" for key, why in report.kept.items())
    proven = "every value proven equal"
    if report.scale_change:
        proven = f"every code proven equal, {_changed(report.scale_change)}"
    kept += _faster(output)
    emit(
        {"output": str(output), **dataclasses.asdict(report), "seconds": seconds},
        as_json,
        f"{output}: {len(report.packed)} matrices packed, {megabytes(report.bytes_before)} -> "
        f"{megabytes(report.bytes_after)}, {proven}, {seconds:.1f} s{kept}",
    )


def import_(
    source: Annotated[
        str, typer.Argument(help="A folder, a hub name, or a .gguf file.", show_default=False)
    ],
    output: Output,
    activation: Annotated[
        str | None,
        typer.Option(help="Activations, where the source does not say: int8 or float32."),
    ] = None,
    group_scale_dtype: GroupScales | None = None,
    as_json: Json = False,
) -> None:
    """Turns a ternary checkpoint of transformers' bitnet method or of compressed-tensors, or a
    ternary GGUF file, into BitLab's own.

    Not needed to run a bitnet one (load_bitnet, eval, generate and chat take it as it is); a packed
    one becomes a deployed model, a latent one a latent model for training.
    """
    from bitcore.errors import ArgumentError
    from bitlab_hf import import_compressed_tensors, import_gguf, load_bitnet, save
    from bitlab_hf.interop.compressed import METHOD

    quiet()
    started = time.perf_counter()
    place, gguf = Path(source), is_gguf(source)
    held = None if gguf else find_scheme(source)
    compressed = isinstance(held, dict) and held.get("quant_method") == METHOD
    if gguf or compressed:
        check_output(None if gguf else source, output)
        check_files([place])
        total = folder_bytes(place) if place.is_dir() else None
        if place.is_file():
            total = place.stat().st_size
        turn = import_compressed_tensors if compressed else import_gguf
        with progress("importing", total) as advance, doing(f"importing {source}", DAMAGED, source):
            change = turn(
                source, output, activation_dtype=activation,
                group_scale_dtype=group_scale_dtype or "float32", advance=advance,
            )  # fmt: skip
        _report("imported", source, output, started, as_json, change, _faster(output))
        return
    for option, given in (("activation", activation), ("group-scale-dtype", group_scale_dtype)):
        if given is not None:
            raise ArgumentError(
                f"import: --{option} must be left out for a bitnet checkpoint, got {given!r}"
            )
    check_output(source, output)
    with library_bars():
        model = load_whole(load_bitnet, source, check_source(source))
        with doing(f"writing {output}"):
            save(model, output, tokenizer=tokenizer_if_any(source))
    _report("imported", source, output, started, as_json)


def export(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Folder, or .gguf file, to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="bitnet or compressed-tensors: for transformers without BitLab; gguf: for "
            "llama.cpp."
        ),
    ] = "bitnet",
    qtype: Annotated[
        str | None,
        typer.Option(
            help="With gguf: Q2_0, TQ2_0, TQ1_0 or BF16. Default: TQ2_0 if it holds every layer, "
            "else Q2_0."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Writes a BitLab model in a format that runs without BitLab."""
    from bitlab_hf import export_bitnet, export_compressed_tensors, export_gguf
    from bitlab_hf.interop.gguf import check_target

    quiet()
    if to not in ("bitnet", "compressed-tensors", "gguf"):
        raise typer.BadParameter(
            f"must be bitnet, compressed-tensors or gguf, got {to}", param_hint="--to"
        )
    started = time.perf_counter()
    if to == "gguf":
        check_output_file(output)
        check_target(output)
    else:
        check_output(source, output)
    change, note = None, ""
    with library_bars() as add:
        model, tokenizer = load_model(check_source(source)), tokenizer_if_any(source)
        with doing(f"writing {output}"):
            if to == "gguf":
                advance = add("exporting", 1.0)
                change = export_gguf(model, output, qtype, tokenizer=tokenizer, advance=advance)
            elif to == "compressed-tensors":
                rounded = export_compressed_tensors(model, output, tokenizer=tokenizer)
                note = _weights_alone(model, rounded)
            else:
                export_bitnet(model, output, tokenizer=tokenizer)
    _report("exported", source, output, started, as_json, change, note)


def push(
    folder: Annotated[Path, typer.Argument(help="A model's folder.", exists=True, file_okay=False)],
    repo: Annotated[str, typer.Argument(help="name/model on the hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Default: private.")] = False,
    latent: Annotated[bool, typer.Option("--latent", help="Allow latent weights.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a ternary model",
    as_json: Json = False,
) -> None:
    """Uploads a model to the hub in one commit; run again, it sends only what is missing."""
    from huggingface_hub.utils.tqdm import enable_progress_bars

    from bitlab_hf.interop.hub import push as push_folder

    quiet()
    if sys.stderr.isatty():
        # The hub's client has bars of its own.
        enable_progress_bars()
    started = time.perf_counter()
    check_folder(folder)
    with doing(f"uploading {folder} to {repo}"):
        commit = push_folder(folder, repo, private=not public, latent=latent, message=message)
    seconds = time.perf_counter() - started
    emit({"commit": commit, "seconds": seconds}, as_json, f"{commit} ({seconds:.1f} s)")


def _changed(change: float) -> str:
    return f"scales rounded by up to {change:.2g} of themselves"


def _weights_alone(model: Any, change: float) -> str:
    """Returns what readers of a format of weights alone make of a model, in lines of their own."""
    from bitlab_hf import quantized_layers

    dtype = str(model.dtype).removeprefix("torch.")
    lines = [f"readers round scales to {dtype}, by up to {change:.2g} of themselves"] * bool(change)
    if any(f.module.quant_config.activation_dtype == "int8" for f in quantized_layers(model)):
        lines.append(
            "activations are int8 in BitLab and floats in readers of this format; "
            "scripts/check_compressed.py measures what that changes"
        )
    return "".join(f"\n{line}" for line in lines)


def _faster(output: Path) -> str:
    """Returns a line on what would be faster where a folder's scales of groups are floats."""
    from bitlab_hf import BitLabConfig
    from bitlab_hf.checkpoint.files import read_config

    config = BitLabConfig.from_dict(read_config(output)["quantization_config"])
    fields = (config.weight_granularity, *(one.get("weight_granularity") for one in
              config.overrides.values()))  # fmt: skip
    if "per_group" not in fields or config.group_scale_dtype == "uint8":
        return ""
    return (
        "\nscales of groups are float32, as they were; --group-scale-dtype uint8 rounds them to be "
        "smaller and faster"
    )


def _report(
    verb: str,
    source: str,
    output: Path,
    started: float,
    as_json: bool,
    scale_change: float | None = None,
    note: str = "",
) -> None:
    """Prints what a command wrote, and where scales were rounded, by how much at most."""
    seconds = time.perf_counter() - started
    given = Path(source)
    before = folder_bytes(given) if given.is_dir() else None
    if given.is_file():
        before = given.stat().st_size
    after = output.stat().st_size if output.is_file() else folder_bytes(output)
    sizes = megabytes(after) if before is None else f"{megabytes(before)} -> {megabytes(after)}"
    found = {
        "output": str(output), "bytes_before": before, "bytes_after": after, "seconds": seconds,
    }  # fmt: skip
    if scale_change is not None:
        found["scale_change"] = scale_change
    rounded = f"{_changed(scale_change)}, " if scale_change else ""
    emit(found, as_json, f"{output}: {verb}, {sizes}, {rounded}{seconds:.1f} s{note}")
