"""`attention`: where a VLM looks, layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmgraft.cli.options import LoadsModels, command


@command()
class Attention(LoadsModels):
    """The share of attention that text gives to visual tokens, per layer: FRANK's `visual_attention`."""

    model: Annotated[str, typer.Argument(help="VLM: folder or hub id")]
    data: Annotated[str, typer.Option("--data", help="question file with images, or lab")] = "lab"
    samples: Annotated[int, typer.Option(help="at most so many questions")] = 64
    batch_size: Annotated[int, typer.Option(help="questions at a time", min=1)] = 4

    def run(self) -> None:
        from vlmgraft.analysis import attention

        with self.progress() as progress:
            shares = attention(
                self.model, self.data, samples=self.samples, batch_size=self.batch_size, progress=progress
            )
        numbers = ", ".join(f"{share:.4g}" for share in shares)
        self.show({"visual_attention": shares}, f"method:\n  name: frank\n  visual_attention: [{numbers}]")
