"""`play`: the VLM and the model with its gates, side by side in the browser."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from vlmgraft.cli.options import LoadsModels, command, environment


@command()
class Play(LoadsModels):
    """A page in the browser: drop a picture, ask, and move the dial from the VLM to the model with its gates."""

    model: Annotated[str, typer.Argument(help="the VLM: folder or hub id")]
    gates: Annotated[Path, typer.Option(help="folder that `gates` or `front` wrote")]
    factors: Annotated[Path, typer.Option(help="factors of the gates")]
    max_new_tokens: Annotated[int, typer.Option(help="length of an answer", min=1)] = 512
    host: Annotated[str, typer.Option(help="address to serve at; 0.0.0.0 lets others in")] = "127.0.0.1"
    port: Annotated[int | None, typer.Option(help="[default: the first free one from 7860 on]")] = None

    def run(self) -> None:
        from vlmgraft.analysis.eval_data import open_vlm
        from vlmgraft.distillation.front import read_path
        from vlmgraft.play.page import require_gradio, served
        from vlmgraft.play.session import opened
        from vlmgraft.spectral.factor_store import open_store

        with (
            TemporaryDirectory(prefix="vlmgraft-play-") as pictures,
            environment(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=pictures),
        ):
            require_gradio()
            path = read_path(self.gates)
            gated = opened(*open_vlm(self.model), open_store(self.factors), list(path.values()))
            with gated as session, served(session, list(path), self.max_new_tokens, self.host, self.port) as address:
                self.show({"address": address}, f"{address}  (Ctrl-C ends it)")
                threading.Event().wait()
