"""llama.cpp's own server, from the sources that its Python package brings, compiled as that package was.

    python benchmarks/cpu/build_llama_server.py --folder DIR

Leaves DIR/environments/llama.cpp-server/llama-server for compare_servers.py. Needs PyPI, cmake, ninja and clang 19.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from peers import PEERS

# the web page apart, which it would have to download
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF")


def main() -> None:
    """Make it, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    program = parser.parse_args().folder / "environments" / "llama.cpp-server" / "llama-server"
    if program.exists():
        return
    peer = PEERS["llama.cpp"]
    environment = os.environ | peer.build_environment
    with tempfile.TemporaryDirectory() as name:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", name)
        subprocess.run([*pip, *peer.requirements], check=True)
        (archive,) = Path(name).glob("*.tar.gz")
        with tarfile.open(archive) as sources:
            sources.extractall(name, filter="data")
        (source,) = Path(name).glob("*/vendor/llama.cpp")
        build = str(source / "build")
        configure = ["cmake", "-G", "Ninja", "-S", str(source), "-B", build, *environment["CMAKE_ARGS"].split(), *FLAGS]
        for command in (configure, ["cmake", "--build", build, "--target", "llama-server"]):
            subprocess.run(command, check=True, env=environment)
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "build" / "bin" / "llama-server", program)


if __name__ == "__main__":
    main()
