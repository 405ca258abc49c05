"""Makes the folder that the tests beside this file need: torch_npu, MindSpeed and what they import.

    python -m tests.npu.real.prepare WHEEL MINDSPEED FOLDER

WHEEL is torch_npu's for this Python and the version of this torch, MINDSPEED a checkout of its branch core_r0.16.0.
gcc makes CANN's libraries: every function that torch_npu wants of them returns 0. pip fetches SciPy.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

LIBRARIES = ("ascendcl", "acl_op_compiler", "acl_tdt_channel", "ge_runner", "graph")  # empty; hccl has the functions
FUNCTION = re.compile(r"(acl|Hccl|Msprof|rt[A-Z])\w*")
NO_DEVICE = "long {name}(unsigned *count) {{ *count = 0; return 0; }}"
DOES_NOTHING = "long {name}(void) {{ return 0; }}"


def wanted_functions(package: Path) -> set[str]:
    """Functions of CANN that the libraries of torch_npu leave undefined."""
    libraries = [*package.glob("_C*.so"), *(package / "lib").glob("*.so")]
    command = ["nm", "-D", "--undefined-only", "--just-symbols", *map(str, libraries)]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return {name for name in names if FUNCTION.fullmatch(name)}


def make_libraries(functions: set[str], folder: Path) -> None:
    folder.mkdir()
    sources = dict.fromkeys(LIBRARIES, "")
    sources["hccl"] = "\n".join(
        (NO_DEVICE if name == "aclrtGetDeviceCount" else DOES_NOTHING).format(name=name) for name in sorted(functions)
    )
    for name, source in sources.items():
        command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(folder / f"lib{name}.so")]
        subprocess.run(command, check=True, input=source, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wheel", "mindspeed", "folder"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    packages = given.folder / "packages"
    packages.mkdir(parents=True)
    with zipfile.ZipFile(given.wheel) as wheel:
        wheel.extractall(packages)
    (packages / "mindspeed").symlink_to((given.mindspeed / "mindspeed").resolve(strict=True))
    make_libraries(wanted_functions(packages / "torch_npu"), given.folder / "lib")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), "scipy"]
    subprocess.run(pip, check=True)


if __name__ == "__main__":
    main()
