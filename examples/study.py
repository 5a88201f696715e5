"""
Both stages of the example as one algorithm, for dialects whose jobs have one stage.

It is the ``__main__.py`` of an archive that also holds ``fit.py`` and ``report.py``; Python runs such a file as it
runs a script. ``0/`` has what ``fit.py`` writes, ``1/`` what ``report.py`` makes of it. algoCustomData.json: what
either of them takes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def main() -> None:
    inputs = Path(os.environ.get("INPUTS", "/data/inputs"))
    outputs = Path(os.environ.get("OUTPUTS", "/data/outputs"))
    # Each module looks at its environment when it is imported.
    os.environ["OUTPUTS"] = str(outputs / "0")
    import fit

    fit.main()
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(outputs / "0", Path(scratch) / "fit")
        shutil.copy(inputs / "algoCustomData.json", scratch)
        os.environ |= {"INPUTS": scratch, "DIDS": '["fit"]', "OUTPUTS": str(outputs / "1")}
        import report

        report.main()


main()
