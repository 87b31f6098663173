"""Point the course at another repository, such as a fork: badges, set-up cells, metadata, links.

    make address REPO=owner/name

Every text file of the checkout that names the present address is changed; the list is printed. The
branch `main` and a public repository are taken for granted: Colab installs from there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def move(root: Path, new: str) -> list[str]:
    """Change the address in all files of the checkout `root` that git knows; returns their names.

    Raises ValueError unless `new` is of the form owner/name.
    """
    if not NAME.fullmatch(new):
        raise ValueError(f"REPO={new!r} must be owner/name, as in https://github.com/owner/name")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = project["urls"]["Repository"].removeprefix("https://github.com/")
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    address = re.compile(rf"(?<![\w.-]){re.escape(old)}(?![\w-])")
    changed: list[str] = []
    if new == old:
        return changed
    for name in filter(None, listed.split("\0")):
        path = root / name
        if not path.is_file():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # a picture, a table, weights
            continue
        if address.search(text):
            path.write_bytes(address.sub(new, text).encode("utf-8"))
            changed.append(name)
    return changed


def main() -> int:
    """The command line; 1 with a sentence for a name that is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", help="owner/name on GitHub")
    try:
        changed = move(Path(__file__).parent.parent, parser.parse_args().repository)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(changed) or "nothing to change: it is the address already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
