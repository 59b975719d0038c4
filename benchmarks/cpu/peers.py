"""The engines that are compared: what runs each, in which environment, and which formats of weights it takes."""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Peer:
    """script: of the side. requirements: pip's, for an environment of its own; none: it runs in this one.

    formats: what it is measured with, beside ours of about as many bits; none: it only converts.
    sees_ours: the packages of this environment (torch, transformers) stand behind its own.
    """

    script: str = ""
    formats: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    sees_ours: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    build_environment: dict[str, str] = field(default_factory=dict)


PEERS: dict[str, Peer] = {
    "ours": Peer(
        script="ours.py",
        formats=(
            *("bfloat16", "w8a8", "w8a16", "w4a8_g32", "w4a8_g128", "w4a16_g128"),
            *("w8a8+embedding", "w4a8_g32+embedding"),  # which is in 8 bits too
        ),
    ),
    "llama.cpp": Peer(
        script="peer_llama.py",
        formats=("Q4_0", "Q4_K_M", "Q8_0", "BF16"),
        requirements=("llama-cpp-python==0.3.36",),
        # GCC 12 compiles its AMX kernels to ones that end with an illegal instruction; clang needs libomp
        build_environment={
            "CC": "clang-19",
            "CXX": "clang++-19",
            "CMAKE_BUILD_PARALLEL_LEVEL": "2",
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
        },
    ),
    "openvino": Peer(
        script="peer_openvino.py",
        formats=("int4", "int8", "fp16"),
        requirements=("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
    ),
    "ctranslate2": Peer(
        script="peer_ctranslate2.py",
        formats=("int8",),
        requirements=("ctranslate2==4.8.5",),
    ),
    "openvino-export": Peer(
        requirements=(
            *("transformers==5.5.4", "optimum-intel==2.2.0", "optimum==2.3.0", "nncf==3.4.0", "openvino==2026.4.1"),
            *("openvino-tokenizers==2026.4.1.0", f"torch=={version('torch')}"),
        ),
        unwanted=("torchvision",),  # what pip brings does not fit torch's CPU build, and breaks it
        sees_ours=True,
    ),
    "ctranslate2-export": Peer(requirements=("ctranslate2==4.8.5",), sees_ours=True),
    "transformers": Peer(script="peer_transformers.py", formats=("bfloat16",)),
}


def python_of(name: str, folder: Path) -> str:
    """The interpreter that runs a peer; its environment is made when it is not there."""
    peer, place = PEERS[name], folder / "environments" / name
    if not peer.requirements:
        return sys.executable
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        if peer.sees_ours:
            (site,) = place.glob("lib/python*/site-packages")
            (site / "behind.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        pip, environment = [str(python), "-m", "pip"], os.environ | peer.build_environment
        subprocess.run([*pip, "install", "--quiet", *peer.requirements], check=True, env=environment)
        for name in peer.unwanted:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", name], check=True)
        (place / "ready").touch()
    return str(python)
