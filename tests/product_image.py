"""
The product's own image, built by its Dockerfile without a network: the packages come from ``scripts/wheels``, the base
is put together from what is on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from docker.errors import BuildError

from blocks.runner import Image
from cli.service import ROOT
from tests.docker_engine import Engine, system_python

PRODUCT: Final = Image("c2d-tests/product", "1")
BASE: Final = Image("c2d-tests/base", "1")

USER: Final = 10001
"""As which everything in the image runs."""

# What packages with compiled parts expect of every base, beside what Python itself needs.
_LIBRARIES: Final = """
    libdl.so.2 libgcc_s.so.1 libm.so.6 libnss_dns.so.2 libnss_files.so.2 libpthread.so.0 libresolv.so.2 librt.so.1
    libseccomp.so.2 libstdc++.so.6 libutil.so.1
""".split()  # noqa: SIM905


def build_product(engine: Engine) -> list[str]:
    """Build PRODUCT on *engine*, which has no network to build it with. Returns what was said."""
    python, _ = system_python()
    subprocess.run(
        [ROOT / "scripts" / "wheels"],
        env={**os.environ, "PYTHON": str(python)},
        check=True,
        stdout=sys.stderr,
        timeout=280,
    )
    engine.build(BASE, files={str(path): path.read_bytes() for path in _libraries()}, python=True)
    try:
        _, said = engine.client.images.build(
            path=str(ROOT),
            tag=PRODUCT.reference,
            buildargs={"BASE": BASE.reference},
            network_mode="none",
            rm=True,
            forcerm=True,
            timeout=280,
        )
    except BuildError as failure:
        raise AssertionError("".join(str(line.get("stream", line)) for line in failure.build_log)[-3000:]) from None
    return [str(line["stream"]) for line in said if isinstance(line, dict) and "stream" in line]


def _libraries() -> list[Path]:
    told = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    known = dict(line.strip().split(" ", 1) for line in told.splitlines()[1:] if " => " in line)
    return [Path(known[name].rpartition(" => ")[2]) for name in _LIBRARIES if name in known]
