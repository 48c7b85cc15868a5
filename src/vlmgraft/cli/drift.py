"""`drift`: how far a model's answers are from the VLM's."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmgraft.cli.options import LoadsModels, command


@command()
class Drift(LoadsModels):
    """KL of a model from the VLM, in nats per token of the VLM's own answers: what `kl_budget` bounds."""

    vlm: Annotated[str, typer.Argument(help="the VLM: folder or hub id")]
    model: Annotated[str, typer.Argument(help="a model of its family, such as a merged folder")]
    data: Annotated[str, typer.Option("--data", help="question file or data set; answers in it are not read")]
    max_new_tokens: Annotated[int, typer.Option(help="length of the VLM's answers", min=1)] = 64
    batch_size: Annotated[int, typer.Option(help="questions at a time", min=1)] = 16
    steer: Annotated[str | None, typer.Option(help="file that `steer` wrote, applied to the model")] = None
    steer_strength: Annotated[float | None, typer.Option(help="in place of the file's own")] = None

    def run(self) -> None:
        from vlmgraft.analysis import kl_divergence
        from vlmgraft.analysis.prediction import chance_that_perception_holds

        with self.progress() as progress:
            kl = kl_divergence(
                self.model, self.vlm, self.data, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size,
                steer=self.steer, steer_strength=self.steer_strength, progress=progress,
            )  # fmt: skip
        holds = chance_that_perception_holds(kl)
        line = f"{self.model}: {kl:.4g} nats per token from {self.vlm} on {self.data}, {self.elapsed()}\n"
        line += f"chance that perception falls by 2 points at most, on such prompts: {holds:.2f}"
        self.show({"kl": kl, "perception_holds": holds, "vlm": self.vlm, "model": self.model, "data": self.data}, line)
