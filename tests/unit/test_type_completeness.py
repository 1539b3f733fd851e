"""Every public name has a declared type that all type checkers infer identically."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright", reason="pyright belongs to the group `dev`")


@pytest.mark.slow
def test_every_public_name_has_a_known_type() -> None:
    environment = Path(sys.executable).parent
    done = subprocess.run(
        [
            *(environment / "pyright", "--verifytypes", "cloudinary_analyze"),
            *("--ignoreexternal", "--outputjson"),
        ],
        env={**os.environ, "PATH": f"{environment}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    completeness = json.loads(done.stdout)["typeCompleteness"]
    unclear = [
        [symbol["name"], *(each["message"] for each in symbol["diagnostics"])]
        for symbol in completeness["symbols"]
        if symbol["isTypeAmbiguous"] or not symbol["isTypeKnown"]
    ]
    assert unclear == []
    assert completeness["completenessScore"] == 1
