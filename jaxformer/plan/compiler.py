"""A compiler in a process of its own: compilers end the process on some errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from jaxformer.errors import UserError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
LAST_WORDS = re.compile(r"[\w.]+(Error|Exception|Refusal)?: |F\d{4} .*\] ")


def ask(
    module: str, job: Any, hardware: str, limit: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """What `python -m module` answers to a job: JSON on its stdin, one line of JSON on its stdout.

    Raises:
      UserError: it took more than `limit` seconds, failed (its last words are in the sentence), or
        answered {"refused": why}.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(job),
            env=os.environ | ENVIRONMENT | (environment or {}),
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"The compiler for {hardware} needed more than {limit:.0f} s; raise --limit."
        ) from error
    answer = done.stdout.strip().splitlines()
    if done.returncode or not answer:
        words = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        errors = [line for line in words if LAST_WORDS.match(line)]
        raise UserError(
            f"The compiler for {hardware} failed (exit code {done.returncode}): "
            f"{(errors or words)[-1][:500]}"
        )
    result = json.loads(answer[-1])
    if "refused" in result:
        raise UserError(result["refused"])
    return result
