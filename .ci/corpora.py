"""Install each package of the extra [corpora] apart; one that is gone is a warning."""

import subprocess
import sys
import tomllib


def main() -> None:
    with open("pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for requirement in extras["corpora"]:
        command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
        if subprocess.run(command).returncode:
            print(f"WARNING: {requirement} could not be installed; its text is left out")


if __name__ == "__main__":
    main()
