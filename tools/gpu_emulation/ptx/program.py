"""PTX text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """The program does what the PTX ISA leaves undefined, or what the interpreter does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # in bits; 1 for a predicate
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    bits: int


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The address of a shared array, or the name of a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    elements: tuple


@dataclass(frozen=True)
class Discard:
    """The sink `_`."""


@dataclass(frozen=True)
class Instruction:
    """`parts` is the opcode split at its dots."""

    parts: tuple[str, ...]
    operands: tuple
    guard: Register | None
    text: str


@dataclass
class Kernel:
    """An entry: parameters (name, bits), code, labels (index into the code), static shared arrays (offset)."""

    name: str
    parameters: list[tuple[str, int]]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0


_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)(\.[xyz])?$")
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_LOCATION = re.compile(r"\.(loc|file)\b")
_LOCATION_LINE = re.compile(r"\n\s*\.loc[^\n]*")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")


def _width(kind: str) -> int:
    return 1 if kind == "pred" else int(re.search(r"\d+", kind)[0])


def split_list(text: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


class _Body:
    """Statements of one entry, with the scopes of their registers."""

    def __init__(self, kernel: Kernel, dynamic: set[str]) -> None:
        self.kernel = kernel
        self.dynamic = dynamic
        self.scopes: list[dict[str, tuple[str, int]]] = []
        self.count = 0

    def declare(self, kind: str, names: str) -> None:
        for item in split_list(names):
            name, _, number = item.partition("<")
            found = [f"{name}{i}" for i in range(int(number.rstrip("> ")))] if number else [name]
            for register in found:
                unique = register if len(self.scopes) == 1 else f"{register}@{self.count}"
                self.scopes[-1][register] = (unique, _width(kind))

    def operand(self, text: str):
        negated = text.startswith("!")
        text = text.removeprefix("!").strip()
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(*scope[text], negated)
        if text == "_":
            return Discard()
        if text[0] == "{":
            return Vector(tuple(self.operand(element) for element in split_list(text[1:-1])))
        if text[0] == "[":
            return self.address(text[1:-1])
        if "|" in text:
            return Vector(tuple(self.operand(element.strip()) for element in text.split("|")))
        if _SPECIAL.match(text):
            return Special(text[1:])
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return Immediate(int(text[2:], 16))
        if re.match(r"-?\d", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.match(r"[\w$]+$", text):
            return Symbol(text)
        raise PtxError(f"cannot read operand {text!r}")

    def address(self, text: str) -> Address:
        base, _, offset = text.partition("+")
        return Address(self.operand(base.strip()), int(offset.strip() or "0", 0))

    def instruction(self, text: str) -> None:
        text = " ".join(text.split())
        found = re.match(r"(?:@(!?)(\S+) )?([\w.:]+)\s*(.*)$", text)
        if not found:
            raise PtxError(f"cannot read instruction {text!r}")
        negated, guard, opcode, rest = found.groups()
        guard = self.operand(negated + guard) if guard else None
        operands = tuple(self.operand(item) for item in split_list(rest))
        self.kernel.code.append(Instruction(tuple(opcode.replace("::", ".").split(".")), operands, guard, text))

    def statement(self, text: str) -> None:
        declaration = _DECLARATION.match(text)
        if declaration:
            self.declare(*declaration.groups())
        elif text.startswith(".shared"):
            align, name, size = _SHARED.match(text).groups()
            start = -(-self.kernel.shared_bytes // int(align)) * int(align)
            self.kernel.shared[name] = start
            self.kernel.shared_bytes = start + int(size)
        elif not text.startswith("."):
            self.instruction(text)


def _read_body(text: str, kernel: Kernel, dynamic: set[str]) -> None:
    """The statements from the opening brace at the start of `text` to its closing one."""
    body, at = _Body(kernel, dynamic), 0
    while True:
        at = _SPACE.match(text, at).end()
        label = _LABEL.match(text, at)
        if text[at] == "{":
            body.count += 1
            body.scopes.append({})
            at += 1
        elif text[at] == "}":
            body.scopes.pop()
            at += 1
            if not body.scopes:
                return
        elif label:
            kernel.labels[label[1]] = len(kernel.code)
            at = label.end()
        elif _LOCATION.match(text, at):
            at = text.index("\n", at)
        elif text[at] == ";":
            at += 1
        else:
            end = text.index(";", at)
            statement = _LOCATION_LINE.sub("", text[at:end]).strip()
            body.statement(statement)
            at = end + 1


def parse(text: str) -> dict[str, Kernel]:
    """Every entry of a PTX module by name."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))
    dynamic = set(re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]", text))
    kernels = {}
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)", text, re.S):
        parameters = []
        for item in split_list(found[2]):
            kind, name, _, count = re.search(r"\.(\w\d+)\b.*?([\w$]+)(\[(\d+)\])?$", item.strip(), re.S).groups()
            parameters.append((name, _width(kind) * int(count or 1)))
        kernel = Kernel(found[1], parameters)
        _read_body(text[text.index("{", found.end()) :], kernel, dynamic)
        for name in dynamic:
            kernel.shared[name] = -(-kernel.shared_bytes // 16) * 16
        kernels[kernel.name] = kernel
    return kernels
