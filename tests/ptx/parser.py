"""PTX text to instructions: a lexer, and one pass over declarations, scopes and statements."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from .findings import Unsupported
from .syntax import SIZES, Args, Function, Imm, Instr, Mem, Module, Operand, Pair, Reg, Sym, Variable, Vec

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+)|(?P<newline>\n)|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<string>"[^"]*")
    |(?P<number>0[fF][0-9a-fA-F]{8}\b|0[dD][0-9a-fA-F]{16}\b|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
       |\d+\.\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+U?)
    |(?P<name>[%$_A-Za-z][\w$]*(?:(?:\.|::)[\w$]+)*)|(?P<directive>\.\w+(?:::\w+)*)
    |(?P<punct>[{}()\[\],;:|!@+\-<>=*~])""",
    re.VERBOSE | re.DOTALL,
)
_LINKING = {".visible", ".extern", ".weak", ".common"}
_TUNING = {".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".maxnctapersm", ".noreturn", ".pragma"}


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int


def tokenize(text: str) -> list[Token]:
    tokens, line, at = [], 1, 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Unsupported(f"PTX line {line}: can't read {text[at : at + 20]!r}")
        kind, piece = str(match.lastgroup), match.group()
        if kind in ("number", "name", "directive", "punct", "string"):
            tokens.append(Token(kind, piece, line))
        line += piece.count("\n")
        at = match.end()
    return tokens


def parse(text: str) -> Module:
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = tokenize(text)
        self.lines = text.split("\n")
        self.at = 0
        self.out = Module()
        self.scoped: set[str] = set()  # variables declared inside a brace scope

    # Tokens

    @property
    def text(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    @property
    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)].line

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1].text

    def accept(self, text: str) -> bool:
        if self.text == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise Unsupported(f"PTX line {self.line}: expected {text!r}, found {self.text!r}")

    def skip_line(self) -> None:
        line = self.line
        while self.at < len(self.tokens) and self.line == line:
            self.at += 1

    def skip_braces(self) -> None:
        self.expect("{")
        depth = 1
        while depth:
            piece = self.next()
            depth += (piece == "{") - (piece == "}")

    # Module level

    def module(self) -> Module:
        while self.at < len(self.tokens):
            start = self.at
            while self.text in _LINKING:
                self.next()
            word = self.text
            if word in (".version", ".address_size", ".file", ".loc"):
                self.skip_line()
            elif word == ".target":
                self.next()
                self.out.target = self.text
                self.skip_line()
            elif word == ".section":
                while self.text != "{":
                    self.next()
                self.skip_braces()
            elif word in (".entry", ".func"):
                self.function()
            elif word in (".global", ".const", ".shared"):
                for variable in self.variable():
                    self.out.variables[variable.name] = variable
            elif word == ".pragma":
                self.skip_line()
            else:
                raise Unsupported(f"PTX line {self.line}: {word!r} at module level")
            assert self.at > start
        return self.out

    def variable(self) -> list[Variable]:
        space = self.next()[1:]
        align, size, vector, kind, found = 0, 0, 1, "", []
        while self.text.startswith("."):
            word = self.next()[1:]
            if word == "align":
                align = int(self.next())
            elif word == "ptr":  # .ptr .global .align 1: a hint on what a parameter points to
                while self.text in (".global", ".shared", ".const", ".local", ".align"):
                    if self.next() == ".align":
                        self.next()
            elif word in ("v2", "v4"):
                vector = int(word[1])
            elif word in SIZES:
                size, kind = SIZES[word] * vector, word
            elif word != "attribute":
                raise Unsupported(f"PTX line {self.line}: .{word} in a declaration")
        while True:
            name, count = self.next(), 1
            while self.accept("["):
                count *= 0 if self.text == "]" else _int(self.next())
                self.expect("]")
            variable = Variable(name, space, size * count, align or size, kind=kind)
            if self.accept("="):
                self.initialiser(variable, size)
            found.append(variable)
            if space == "param" or not self.accept(","):
                break
        if space != "param" or self.text == ";":
            self.expect(";")
        return found

    def initialiser(self, variable: Variable, size: int) -> None:
        data = bytearray()
        braced = self.accept("{")
        while self.text not in ("}", ";"):
            if self.accept(","):
                continue
            generic = self.accept("generic")
            if generic:
                self.expect("(")
            minus = self.accept("-")
            token = self.tokens[self.at]
            self.next()
            if token.kind == "number":
                value = _literal(token.text)
                if value.float_bits > 0:
                    data += struct.pack("<f" if size == 4 else "<d", value.value)
                else:
                    number = int(value.value) * (-1 if minus else 1)
                    data += (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            elif token.kind == "name":
                addend = _int(self.next()) if self.accept("+") else 0
                variable.links.append((len(data), token.text, addend))
                data += bytes(size)
            else:
                raise Unsupported(f"PTX line {token.line}: {token.text!r} in an initialiser")
            if generic:
                self.expect(")")
        if braced:
            self.expect("}")
        variable.init = bytes(data).ljust(variable.size, b"\0")

    # Functions

    def params(self) -> list[Variable]:
        found: list[Variable] = []
        if self.accept("("):
            while not self.accept(")"):
                found += self.variable()
                self.accept(",")
        return found

    def function(self) -> None:
        entry = self.next() == ".entry"
        results = self.params() if not entry else []
        function = Function(self.next(), entry, self.params(), results)
        while self.text in _TUNING:
            word = self.next()
            numbers = []
            while self.tokens[self.at].kind in ("number", "string") or self.text == ",":
                numbers.append(self.next())
            if word == ".reqntid":
                function.threads = 1
                for number in numbers:
                    function.threads *= 1 if number == "," else _int(number)
        if self.accept(";"):  # a prototype
            return
        self.expect("{")
        self.body(function)
        self.out.functions[function.name] = function

    def body(self, function: Function) -> None:
        scopes: list[dict[str, str]] = [{}]
        count = 0
        while scopes:
            word = self.text
            if word == "{":
                self.next()
                count += 1
                scopes.append({})
            elif word == "}":
                self.next()
                scopes.pop()
            elif word in (".loc", ".file"):
                self.skip_line()
            elif word == ".pragma":
                while not self.accept(";"):
                    self.next()
            elif word == ".reg":
                self.registers(function, scopes, count)
            elif word in (".local", ".shared", ".param"):
                for variable in self.variable():
                    if len(scopes) > 1:
                        unique = f"{variable.name}@{count}"
                        scopes[-1][variable.name] = unique
                        variable.name = unique
                        self.scoped.add(unique)
                    function.variables.append(variable)
            elif self.tokens[self.at + 1].text == ":":
                self.next(), self.next()
                if self.accept(".branchtargets"):
                    function.tables[word] = [t for t in self.until_semicolon() if t != ","]
                elif word in function.labels:
                    raise Unsupported(f"PTX line {self.line}: label {word} twice")
                else:
                    function.labels[word] = len(function.code)
            elif word == ";":
                self.next()
            else:
                function.code.append(self.instruction(scopes))

    def until_semicolon(self) -> list[str]:
        pieces = []
        while not self.accept(";"):
            pieces.append(self.next())
        return pieces

    def registers(self, function: Function, scopes: list[dict[str, str]], scope: int) -> None:
        self.next()
        kind = self.next()[1:]
        while True:
            name = self.next()
            names = [name]
            if self.accept("<"):
                names = [f"{name}{i}" for i in range(_int(self.next()))]
                self.expect(">")
            for each in names:
                unique = each if len(scopes) == 1 else f"{each}@{scope}"
                scopes[-1][each] = unique
                function.regs[unique] = kind
            if not self.accept(","):
                break
        self.expect(";")

    def instruction(self, scopes: list[dict[str, str]]) -> Instr:
        line = self.line
        pred = None
        if self.accept("@"):
            negated = self.accept("!")
            pred = Reg(_lookup(self.next(), scopes), negated)
        if self.tokens[self.at].kind != "name":
            raise Unsupported(f"PTX line {line}: {self.text!r} where an instruction should be")
        op, *mods = self.next().split(".")
        operands: list[Operand] = []
        while not self.accept(";"):
            operands.append(self.operand(scopes))
            if not self.accept(","):
                self.expect(";")
                break
        last = self.tokens[self.at - 1].line
        text = " ".join(piece.strip() for piece in self.lines[line - 1 : last])
        return Instr(op, tuple(mods), tuple(operands), pred, line, text)

    def operand(self, scopes: list[dict[str, str]]) -> Operand:
        if self.accept("{"):
            items = []
            while not self.accept("}"):
                items.append(self.operand(scopes))
                self.accept(",")
            return Vec(tuple(items))
        if self.accept("("):
            names = []
            while not self.accept(")"):
                names.append(self.operand(scopes))
                self.accept(",")
            return Args(tuple(names))
        if self.accept("["):
            base = self.simple(scopes)
            offset = self.offset()
            self.expect("]")
            if isinstance(base, Sym):
                return Mem(Sym(base.name), base.offset + offset)
            assert isinstance(base, Reg | Imm)
            return Mem(base, offset)
        first = self.simple(scopes)
        return Pair(first, self.simple(scopes)) if self.accept("|") else first

    def offset(self) -> int:
        total = 0
        while self.text in ("+", "-"):
            sign = 1
            while self.text in ("+", "-"):  # the compilers write [%rd1+-4]
                sign = -sign if self.next() == "-" else sign
            total += sign * _int(self.next())
        return total

    def simple(self, scopes: list[dict[str, str]]) -> Operand:
        if self.accept("!"):
            return Reg(_lookup(self.next(), scopes), negated=True)
        if self.accept("-"):
            value = _literal(self.next())
            return Imm(-value.value, value.float_bits)
        token = self.tokens[self.at]
        self.next()
        if token.kind == "number":
            return _literal(token.text)
        if token.kind != "name":
            raise Unsupported(f"PTX line {token.line}: operand {token.text!r}")
        declared = any(token.text in scope for scope in scopes)
        name = _lookup(token.text, scopes)
        if name in self.scoped or (not declared and not name.startswith("%")):
            return Sym(name, self.offset() if name != "_" else 0)
        return Reg(name)


def _lookup(name: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name


def _int(text: str) -> int:
    return int(text.rstrip("U"), 0)


def _literal(text: str) -> Imm:
    if text[:2] in ("0f", "0F"):
        return Imm(struct.unpack(">f", bytes.fromhex(text[2:]))[0], 32)
    if text[:2] in ("0d", "0D"):
        return Imm(struct.unpack(">d", bytes.fromhex(text[2:]))[0], 64)
    if re.search(r"[.eE]", text) and not text.startswith(("0x", "0X")):
        return Imm(float(text), 0)
    return Imm(_int(text))
