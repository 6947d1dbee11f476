"""Before torch is downloaded: say so where pip would fetch a CUDA build no driver here can use.

Usage: torch_build.py REQUIREMENT CPU_WHEEL_INDEX TORCH_ARGS
"""

import json
import shlex
import shutil
import subprocess
import sys
import time


def planned_packages(requirement: str, arguments: list[str]) -> list[dict]:
    """What pip would install, by its own dry run; empty where it cannot say."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *arguments, requirement], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["install"]
    except (ValueError, KeyError):
        return []


def main() -> None:
    requirement, cpu_wheels, given = sys.argv[1:4]
    if given or shutil.which("nvidia-smi") or sys.platform != "linux":
        return
    names = [package["metadata"]["name"] for package in planned_packages(requirement, [])]
    if any(name.startswith(("nvidia-", "cuda-")) for name in names):
        print(
            "No NVIDIA driver was found, but pip is about to download PyTorch's CUDA build "
            f"(several GB).\nFor the CPU build, stop this (Ctrl-C) and run:\n"
            f"  make setup TORCH_ARGS={shlex.quote('--index-url ' + cpu_wheels)}\n"
            "Going on in 10 seconds.",
            flush=True,
        )
        time.sleep(10)


if __name__ == "__main__":
    main()
