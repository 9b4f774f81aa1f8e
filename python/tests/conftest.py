"""Jobs for the tests: a worker's program as a text, run by ``gradwire run`` on this machine."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

PATIENCE = 120
"""Seconds after which a job counts as hung, on a busy machine too."""


@dataclass
class Outcome:
    """How a job has ended."""

    code: int
    output: str

    def values(self, name: str) -> list[str]:
        """What the workers have said in lines of ``name: value``, sorted."""
        lines = (line.partition(f"{name}: ") for line in self.output.splitlines())
        return sorted(value for _, mark, value in lines if mark)


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program, given as its text, as every worker of a job. It starts with numpy as ``np``, ``gradwire`` and ``os``."""

    def run(program: str, *flags: str, workers: int = 2, servers: int = 2, code: int = 0) -> Outcome:
        file = tmp_path / "program.py"
        file.write_text("import os\nimport numpy as np\nimport gradwire\n" + textwrap.dedent(program))
        command = shutil.which("gradwire")
        assert command is not None, "the wheel's command is not on PATH"
        line = [command, "run", "-s", str(servers), "-n", str(workers), *flags, "--", sys.executable, str(file)]
        home = tmp_path / "home"
        home.mkdir(mode=0o700, exist_ok=True)
        # What tests share (gpt2.py) is found by the programs too.
        found = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"GRADWIRE_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": found}
        done = subprocess.run(
            line, env=environment, cwd=tmp_path, timeout=PATIENCE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}"
        return Outcome(done.returncode, done.stdout)

    return run
