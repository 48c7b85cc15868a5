"""`lab path`: the embedded trio."""

from __future__ import annotations

from vlmgraft.cli.options import Command, command, lab_app


@command(lab_app, "path")
class LabPath(Command):
    """Print the folder of the embedded trio (base, vlm, donor)."""

    def run(self) -> None:
        from vlmgraft.lab import trio_path

        path = str(trio_path())
        self.show({"path": path}, path)
