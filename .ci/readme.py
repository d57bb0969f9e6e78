"""The README's commands, and whether all that the README names exists.

python .ci/readme.py            checks; exit status 1 and one line for each thing that is missing
python .ci/readme.py HEADING    prints the one command below a heading
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADINGS = ("Quickstart", "Tests")
# Files that a run makes, or that a user brings; they are in no clone.
NOT_IN_A_CLONE = ("runs/", "data/", "checkpoints/", ".venv")


def readme() -> str:
    """The text of README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def command(text: str, heading: str) -> str:
    """The one-line command in the first code block below `heading`.

    Raises:
      ValueError: there is no such block, more than a line before it, or more than a line in it.
    """
    pattern = rf"^#+ {heading}\n+(?:[^\n`]+\n+)?```(?:bash|sh)?\n([^\n]+)\n```$"
    found = re.findall(pattern, text, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(
            f"README.md: {len(found)} headings '{heading}' with a code block of one line"
        )
    return found[0]


def named_paths(text: str) -> set[str]:
    """Paths of this repository that the README names: in code, in commands and in links."""
    words = {
        word
        for code in re.findall(r"```[a-z]*\n(.*?)\n```|`([^`\n]+)`", text, re.DOTALL)
        for word in re.split(r"[\s=,;()'\"]+", "\n".join(code))
    }
    words |= {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    top = {path.name for path in ROOT.iterdir()}
    return {
        word.rstrip("/.")
        for word in words
        if ("/" in word or re.search(r"\.(py|md|txt|toml|sh|ipynb|yaml)$", word))
        and word.split("/")[0] in top
        and not word.startswith(NOT_IN_A_CLONE)
        and not re.search(r"[A-Z]{3,}(/|\.|$)|[*<>{}$]", word.split("/")[-1].replace("README", ""))
    }


def tree_lines(text: str) -> dict[str, str]:
    """Path -> description of each line of the tree below the heading 'Files'."""
    match = re.search(r"^#+ Files\n.*?```\w*\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    if not match:
        raise ValueError("README.md: no heading 'Files' with a code block")
    lines, folder = {}, ""
    for line in match[1].splitlines():
        name, _, description = line.strip().partition(" ")
        path = name if not line.startswith(" ") else folder + name
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        lines[path] = description.strip()
    return lines


def problems(text: str) -> list[str]:
    """One line for each thing that is not as the README says."""
    found = []
    for heading in HEADINGS:
        try:
            command(text, heading)
        except ValueError as error:
            found.append(str(error))
    for path in sorted(named_paths(text)):
        if not (ROOT / path).exists():
            found.append(f"README.md names {path}, which does not exist")
    for module in sorted(set(re.findall(r"python3? -m (l2s_jax[\w.]*)", text))):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            found.append(f"README.md runs python -m {module}, which does not exist")

    tree = tree_lines(text)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "--", "l2s_jax", "configs", "launch"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    present = {path for path in listed if (ROOT / path).exists()}
    empty = {path for path in present if not (ROOT / path).stat().st_size}
    for path, description in tree.items():
        if not (ROOT / path).exists():
            found.append(f"README.md: the tree lists {path}, which does not exist")
        if not (description or path.endswith("/")):
            found.append(f"README.md: the tree has no description for {path}")
    for path in sorted(present - empty - tree.keys()):
        found.append(f"README.md: the tree does not list {path}")
    return found


def main(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    text = readme()
    if arguments:
        print(command(text, arguments[0]))
        return 0
    found = problems(text)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
