"""``fedsieve generate``: a prompt and its continuation, printed as it comes."""

from __future__ import annotations

from typing import Annotated

import typer

from fedsieve.cli.options import Model, Own


def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The beginning of the text.")],
    tokens: Annotated[int, typer.Option(metavar="N", help="How many tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(metavar="T", help="0: always the likeliest token.")] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Draw among the K likeliest tokens.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    kernels: Annotated[str, typer.Option(help="auto, sparse or dense.")] = "auto",
    recipe: Own = "",
) -> None:
    """Continue a text by the deployed model of a run, which was trained to tell the next token."""
    from fedsieve.runs.generation import Sampling, choose_next, generate, tokenize
    from fedsieve.runs.model import open_model

    how = Sampling(tokens, temperature, top_k, seed)
    trained = open_model(model, recipe)
    start = tokenize(prompt, trained.metadata)
    next_logits, way = choose_next(trained, kernels)
    typer.echo(f"kernels: {way}", err=True)
    typer.echo(prompt, nl=False)
    for text in generate(next_logits, start, trained.metadata, how):
        typer.echo(text, nl=False)
    typer.echo()
