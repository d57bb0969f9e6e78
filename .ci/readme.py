"""Whether all that the README and the pages in docs/ name exists; and the README's commands.

python .ci/readme.py            checks; exit status 1 and one line for each thing that is missing
python .ci/readme.py HEADING    prints the one command below a heading of the README

Checked are files and folders of this repository, modules that `python -m` runs, and the flags of
our own commands; links between the pages are checked by `mkdocs build --strict`.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADINGS = ("Quickstart", "Tests")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "benchmarks/gpu/README.md")
# Files that a run or a build makes, or that a user brings; they are in no clone.
NOT_IN_A_CLONE = ("runs/", "data/", "checkpoints/", "models/", "build/", ".venv")


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


def code_of(text: str) -> list[str]:
    """Code blocks and inline code, lines that end in a backslash joined."""
    found = re.findall(r"^ *```[^\n]*\n(.*?)\n *```$|`([^`\n]+)`", text, re.DOTALL | re.MULTILINE)
    return [re.sub(r"\\\n\s*", "", "".join(code)) for code in found]


def named_paths(text: str) -> set[str]:
    """Paths of this repository that a page names: in code, and in links from its top level."""
    words = {word for code in code_of(text) for word in re.split(r"[\s=,;()'\"]+", code)}
    words |= {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    top = {path.name for path in ROOT.iterdir()}
    return {
        word.rstrip("/.:")
        for word in words
        if ("/" in word or re.search(r"\.(py|md|txt|toml|sh|ipynb|yaml|yml|cff)$", word))
        and word.split("/")[0] in top
        and not word.startswith(NOT_IN_A_CLONE)
        and not re.search(r"[A-Z]{3,}(/|\.|$)|[*<>{}$]", word.split("/")[-1].replace("README", ""))
    }


def source_of(program: str) -> pathlib.Path | None:
    """The file that `python -m NAME`, `python FILE` or a script runs."""
    if "/" in program:
        path = ROOT / program
        return path if path.is_file() else None
    path = ROOT / program.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__main__.py")
    return next((file for file in files if file.exists()), None)


def flags_of(file: pathlib.Path) -> set[str]:
    """Flags that a command takes, as its source has them: of absl, of argparse, of a script.

    Several commands share those of a module `flags`.
    """
    text = file.read_text(encoding="utf-8")
    for module in re.findall(r"^from (l2s_jax[\w.]*)(?:\.flags import| import flags)", text, re.M):
        text += source_of(f"{module}.flags").read_text(encoding="utf-8")
    names = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", text))
    names |= set(re.findall(r"--([a-z][\w-]*)", text))
    if 'f"--{' in text:  # named in a loop
        names |= set(re.findall(r"\"([a-z]\w*)\"", text))
    return names | {f"no{name}" for name in names} | {f"no-{name}" for name in names} | {"help"}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(program, flags) of each call of a command of this repository."""
    calls = []
    for code in code_of(text):
        for line in code.splitlines():
            for part in re.split(r"&&|\||;", line):
                match = re.search(
                    r"python3? (?:-m (l2s_jax[\w.]*)|((?:benchmarks|launch|tests)/\S+\.py))"
                    r"|(?:^|\s)((?:benchmarks|launch)/\w+\.sh)",
                    part,
                )
                if match:
                    # What comes behind a lone -- is handed on.
                    rest = re.split(r"\s--\s", part[match.end() :])[0]
                    flags = re.findall(r"(?:^|\s)--([a-z][\w-]*)", rest)
                    calls.append((next(filter(None, match.groups())), flags))
    return calls


def problems_of(page: str, text: str, known: set[str]) -> list[str]:
    """One line for each thing that is not as a page says; `known` are the flags of all commands."""
    found = []
    for path in sorted(named_paths(text)):
        if not (ROOT / path).exists():
            found.append(f"{page} names {path}, which does not exist")
    for program, flags in commands(text):
        file = source_of(program)
        if file is None:
            found.append(f"{page} runs {program}, which does not exist")
            continue
        for flag in sorted(set(flags) - flags_of(file)):
            found.append(f"{page} gives {program} --{flag}, which it does not take")
    for code in code_of(text):
        match = re.match(r"--([a-z][\w-]*)", code)
        if match and match[1] not in known:
            found.append(f"{page} names --{match[1]}, which no command takes")
    return found


def problems() -> list[str]:
    """One line for each thing that is not as the pages say."""
    found = []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading in HEADINGS:
        try:
            command(readme, heading)
        except ValueError as error:
            found.append(str(error))
    if (lines := readme.count("\n")) > 150:
        found.append(f"README.md has {lines} lines, expected at most 150")

    pages = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for pattern in PAGES
        for path in sorted(ROOT.glob(pattern))
    }
    programs = {program for text in pages.values() for program, _ in commands(text)}
    known = {
        flag for program in programs if (file := source_of(program)) for flag in flags_of(file)
    }
    for page, text in pages.items():
        found += problems_of(page, text, known)

    everything = "\n".join(pages.values())
    for folder, pattern in (("configs", "*.py"), ("launch", "*"), ("colabs", "*.ipynb")):
        for path in sorted((ROOT / folder).glob(pattern)):
            if f"{folder}/{path.name}" not in everything:
                found.append(f"no page names {folder}/{path.name}")
    for room in sorted(path.parent.name for path in ROOT.glob("l2s_jax/*/__init__.py")):
        if f"| `{room}/` |" not in pages["docs/development.md"]:
            found.append(f"docs/development.md: the table of rooms lacks {room}/")
    return found


def main(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    if arguments:
        print(command((ROOT / "README.md").read_text(encoding="utf-8"), arguments[0]))
        return 0
    found = problems()
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
