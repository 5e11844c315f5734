"""Inner loops of compiled kernels: what they count, and what they keep in memory."""

import re
import subprocess
from pathlib import Path

JUMP = re.compile(r"(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\w+,)\s+([0-9a-f]+)\b")  # x86-64, then AArch64
SPILL = re.compile(r"\(%r[sb]p\).*%[xyz]mm|%[xyz]mm.*\(%r[sb]p\)|\b[qdv]\d+\b.*\[(?:sp|x29)\b")

Function = tuple[str, list[tuple[int, str]]]


def functions(binary: Path, objdump: str = "objdump") -> list[Function]:
    """(symbol, [(address, instruction)]) of a library or object file; symbols without the anonymous namespace."""
    command = [objdump, "-d", "-C", "--no-show-raw-insn", str(binary)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = []
    for block in text.split("\n\n"):
        if header := re.match(r"\s*[0-9a-f]+ <(.*)>:\n", block):
            lines = re.findall(r"^\s*([0-9a-f]+):\t(.*)$", block, re.MULTILINE)
            symbol = header[1].replace("qk::(anonymous namespace)::", "")
            found.append((symbol, [(int(address, 16), code) for address, code in lines]))
    return found


def loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the innermost loops: from the target of a backward jump to the jump, with no return in between."""
    spans = []
    for address, code in instructions:
        jump = JUMP.match(code)
        if jump and instructions[0][0] <= int(jump[1], 16) < address:
            spans.append((int(jump[1], 16), address))
    innermost = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    bodies = [[code for address, code in instructions if start <= address <= end] for start, end in innermost]
    return [body for body in bodies if not any(code.startswith("ret") for code in body)]


def check_registers(found: list[Function], tile: str, instruction: str, count: int) -> None:
    """Fail unless each loop of `tile` that holds `instruction` has a multiple of `count` of them and no spill."""
    bodies = [
        body
        for symbol, instructions in found
        if re.search(rf"(?:^|[ :]){re.escape(tile)}\(", symbol)
        for body in loops(instructions)
        if any(re.search(instruction, code) for code in body)
    ]
    assert bodies, f"no loop of {tile} holds {instruction}: was the library stripped?"
    for body in bodies:
        work = sum(bool(re.search(instruction, code)) for code in body)
        spills = [code for code in body if SPILL.search(code)]
        assert work % count == 0, "\n".join(body)
        assert not spills, "\n".join(spills)
