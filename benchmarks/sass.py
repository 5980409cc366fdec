"""What the assembler makes of GPU kernels: registers, spills, instructions. No GPU is needed.

`ptxas` and `nvdisasm` come with the extra `aot`.
"""

from __future__ import annotations

import collections
import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

from jaxformer.errors import UserError

ARCHITECTURE = "sm_90a"
OPCODE = re.compile(r"^\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)[.\s;]", re.MULTILINE)


def read(folder: Path) -> list[dict[str, Any]]:
    """Of every kernel whose PTX is in a folder: name, registers, spills in bytes, instructions.

    Raises:
      UserError: the assembler is not installed.
    """
    found = []
    for ptx in sorted(folder.glob("*.ptx")):
        binary = ptx.with_suffix(".cubin")
        told = _run("ptxas", "-v", f"-arch={ARCHITECTURE}", str(ptx), "-o", str(binary)).stderr
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", told)
        assembly = _run("nvdisasm", "-c", str(binary)).stdout
        found.append(
            {
                "name": ptx.stem,
                "registers": max(map(int, re.findall(r"Used (\d+) registers", told)), default=0),
                "spills": sum(map(int, spills)),
                "serialized": "serializ" in told,
                "instructions": dict(collections.Counter(OPCODE.findall(assembly))),
            }
        )
    return found


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A tool of NVIDIA's wheels, which put it beside the package and not on the path."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    places = [path for folder in folders for path in Path(folder).glob(f"*/bin/{tool}")]
    if not places:
        raise UserError(f"There is no {tool} here: pip install 'jaxformer[aot]' brings it.")
    return subprocess.run([places[0], *arguments], capture_output=True, text=True, check=True)
