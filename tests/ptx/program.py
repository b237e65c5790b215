"""A kernel made flat: calls are inlined, so that control flow is one list of instructions with labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .findings import Unsupported
from .syntax import Args, Function, Instr, Mem, Module, Operand, Pair, Reg, Sym, Variable, Vec


@dataclass
class Program:
    name: str
    params: list[Variable]
    threads: int | None
    code: list[Instr] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    regs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)  # module's and functions', by unique name


def flatten(module: Module, name: str) -> Program:
    if name not in module.functions or not module.functions[name].entry:
        entries = [f.name for f in module.functions.values() if f.entry]
        raise KeyError(f"no kernel {name!r} in this PTX; it has {entries}")
    function = module.functions[name]
    program = Program(name, function.params, function.threads)
    program.variables.update(module.variables)
    program.variables.update({param.name: param for param in function.params})
    _Flattener(module, program).place(function, "", {}, ())
    return program


class _Flattener:
    def __init__(self, module: Module, program: Program) -> None:
        self.module = module
        self.program = program
        self.copies = 0

    def place(self, function: Function, prefix: str, bound: dict[str, str], stack: tuple[str, ...]) -> None:
        """Append one copy of a function's body; `bound` maps its parameters to the caller's variables."""
        if function.name in stack:
            raise Unsupported(f"recursion: {' -> '.join((*stack, function.name))}")
        stack = (*stack, function.name)
        program = self.program
        names = {name: prefix + name for name in function.regs} | bound
        for variable in function.variables:
            # A function's .shared is one for all calls; .local and .param live as long as the call.
            unique = variable.name if variable.space == "shared" else prefix + variable.name
            names[variable.name] = unique
            space = "local" if variable.space == "param" else variable.space
            program.variables[unique] = replace(variable, name=unique, space=space)
        for label in function.labels:
            names[label] = prefix + label
        for table, targets in function.tables.items():
            names[table] = prefix + table
            program.tables[prefix + table] = [prefix + target for target in targets]
        program.regs.update({names[name]: kind for name, kind in function.regs.items()})
        places: dict[int, list[str]] = {}
        for label, at in function.labels.items():
            places.setdefault(at, []).append(prefix + label)
        end = prefix + "(end)"
        for at, instr in enumerate(function.code):
            for label in places.get(at, ()):
                program.labels[label] = len(program.code)
            operands = tuple(_rename(operand, names) for operand in instr.operands)
            pred = replace(instr.pred, name=names[instr.pred.name]) if instr.pred else None
            if instr.op == "call":
                self.call(replace(instr, operands=operands), stack)
            elif instr.op == "ret" and prefix:
                program.code.append(replace(instr, op="bra", mods=(), operands=(Sym(end),), pred=pred))
            else:
                program.code.append(replace(instr, operands=operands, pred=pred))
        for label in places.get(len(function.code), ()):
            program.labels[label] = len(program.code)
        if prefix:
            program.labels[end] = len(program.code)

    def call(self, instr: Instr, stack: tuple[str, ...]) -> None:
        operands = list(instr.operands)
        results = _names(operands)
        target = operands.pop(0)
        args = _names(operands)
        if target == Sym("__assertfail"):
            self.program.code.append(replace(instr, op="trap", mods=(), operands=()))
            return
        callee = self.module.functions.get(target.name) if isinstance(target, Sym) else None
        if callee is None or operands or instr.pred is not None:
            raise Unsupported(f"PTX line {instr.line}: indirect, external or predicated call: {instr.text}")
        self.copies += 1
        formal = [v.name for v in (*callee.results, *callee.params)]
        actual = [operand.name for operand in (*results, *args) if isinstance(operand, Sym)]
        if len(formal) != len(actual):
            raise Unsupported(
                f"PTX line {instr.line}: {instr.text} passes {len(actual)} of {len(formal)} params"
            )
        bound = dict(zip(formal, actual, strict=True))
        self.place(callee, f"{callee.name}#{self.copies}/", bound, stack)


def _names(operands: list[Operand]) -> tuple[Operand, ...]:
    """The parenthesised list that comes next, if one does."""
    if operands and isinstance(operands[0], Args):
        first = operands.pop(0)
        assert isinstance(first, Args)
        return first.names
    return ()


def _rename(operand: Operand, names: dict[str, str]) -> Operand:
    match operand:
        case Reg(name, negated):
            return Reg(names.get(name, name), negated)
        case Sym(name, offset):
            return Sym(names.get(name, name), offset)
        case Mem(base, offset):
            renamed = _rename(base, names)
            assert isinstance(renamed, type(base))
            return Mem(renamed, offset)
        case Vec(items):
            return Vec(tuple(_rename(item, names) for item in items))
        case Pair(first, second):
            return Pair(_rename(first, names), _rename(second, names))
        case Args(items):
            return Args(tuple(_rename(item, names) for item in items))
        case _:
            return operand
