"""``bitlab rotate``: a float model in a basis in which less is lost when it becomes ternary."""

from __future__ import annotations

import time

from bitlab_hf.cli.common import FloatSource, Json, Output, Seed, emit, quiet
from bitlab_hf.cli.errors import doing


def rotate(source: FloatSource, output: Output, seed: Seed = 0, as_json: Json = False) -> None:
    """Turns a float model's hidden states into another basis, in which less is lost when it becomes
    ternary.

    OUTPUT is a float model of the same class and dtype that computes the same; its embedding and
    its head are no longer tied. Train or deploy it like the original.
    """
    from bitcore.errors import ArgumentError
    from bitlab_hf.checkpoint.saving import replacing
    from bitlab_hf.cli.gguf_source import as_folder
    from bitlab_hf.cli.loading import find_scheme, load_model, tokenizer_if_any
    from bitlab_hf.cli.places import check_output
    from bitlab_hf.train import rotate as turn

    quiet()
    check_output(source, output)
    if find_scheme(source) is not None:
        raise ArgumentError(
            f"rotate: MODEL must be in full precision, got {source}, which is quantized\n"
            "Rotate the float model that it is made from."
        )
    started = time.perf_counter()
    with as_folder(source) as folder:
        model = load_model(folder)
        dtype = model.dtype
        with doing(f"rotating {source}"):
            difference = turn(model.float(), seed=seed)
        with doing(f"writing {output}"), replacing(output, "rotate") as staged:
            model.to(dtype).save_pretrained(staged)
            tokenizer = tokenizer_if_any(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(staged)
    seconds = time.perf_counter() - started
    found = {"output": str(output), "difference": difference, "seconds": seconds}
    emit(
        found, as_json,
        f"{output}: the same model in another basis, logits differ by {difference:.1e} "
        f"before weights are rounded to {str(dtype).removeprefix('torch.')}, {seconds:.1f} s",
    )  # fmt: skip
