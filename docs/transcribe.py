"""Runs docs/tutorial.sh command by command and writes docs/tutorial.md: the text, the commands, what they said.

    python docs/transcribe.py --data DIR --weights FILE      from a fresh clone; takes a quarter of an hour on two cores

DIR holds train/<class>/ and test/<class>/ with photographs, FILE pretrained weights. The commands run in one shell, in
the clone and then in an empty folder. A command that fails ends it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
END = "--end of command--"
SHOWN = 44  # lines of a command's output; of more, the middle is left out


def blocks(script: str) -> list[tuple[str, str]]:
    """The script in parts: ("text", paragraph), ("heading", title) or ("command", command with its here-document)."""
    parts: list[tuple[str, str]] = []
    lines = iter(script.splitlines())
    for line in lines:
        if line.startswith("## "):
            parts.append(("heading", line[3:]))
        elif line.startswith("#"):
            parts.append(("text", line[1:].strip()))
        elif line:
            command = [line]
            marker = re.search(r"<<'(\w+)'", line)
            while marker and command[-1] != marker[1]:
                command.append(next(lines))
            parts.append(("command", "\n".join(command)))
        else:
            parts.append(("gap", ""))
    return parts


class Shell:
    """One bash that runs commands in turn."""

    def __init__(self, folder: Path, **variables: str) -> None:
        environment = {**os.environ, **variables}
        self.process = subprocess.Popen(
            ["bash", "-e"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment,
        )

    def run(self, command: str) -> str:
        """What the command prints.

        Raises:
            RuntimeError: it failed.
        """
        self.process.stdin.write(f"{command}\necho '{END}'\n")
        self.process.stdin.flush()
        said = []
        for line in self.process.stdout:
            if line.rstrip("\n").endswith(END):
                return "".join([*said, line.replace(f"{END}\n", "")])
            said.append(line)
        raise RuntimeError(f"transcribe: every command must succeed; got {command!r}:\n{''.join(said)}")


def shortened(output: str) -> str:
    """At most `SHOWN` lines."""
    lines = [line.rstrip() for line in output.strip("\n").splitlines()]
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN // 2], f"... {len(lines) - SHOWN} more lines ...", *lines[-SHOWN // 2 :]]
    return "\n".join(lines)


def transcribe(script: str, shell: Shell, hidden: dict[str, str]) -> str:
    """The script with what its commands print, as Markdown. hidden: texts of this machine and what stands for them."""
    page = ["<!-- made by docs/transcribe.py from docs/tutorial.sh -->", "# Tutorial", ""]
    for kind, content in blocks(script):
        if kind == "heading":
            page += [f"## {content}"]
        elif kind in ("text", "gap"):
            page += [content]
        else:
            started = time.monotonic()
            output = shell.run(content)
            seconds = time.monotonic() - started
            for text, name in hidden.items():
                output = output.replace(text, name)
            took = [f"# {seconds:.0f} s"] if seconds >= 5 else []
            page += ["```console", f"$ {content}", *([shortened(output)] if output.strip() else []), *took, "```"]
    return re.sub(r"```\n```console\n", "", "\n".join(page)) + "\n"


def main() -> None:
    """Runs the script in this clone and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    arguments = parser.parse_args()
    data, weights = arguments.data.resolve(), arguments.weights.resolve()
    work = tempfile.mkdtemp()  # kept, to look at what was made
    shell = Shell(HERE.parent, DATA=str(data), WEIGHTS=str(weights), WORK=work)
    hidden = {str(weights): "$WEIGHTS", str(data): "$DATA", work: "$WORK", str(HERE.parent.resolve()): "ffvt"}
    page = transcribe((HERE / "tutorial.sh").read_text(encoding="utf-8"), shell, hidden)
    (HERE / "tutorial.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
