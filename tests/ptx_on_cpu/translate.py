"""PTX to C++: a function for each kernel, which one thread runs; machine.h has the instructions' meaning.

A register is 64 bits without a type: an instruction's own type says what it takes and leaves there, as in PTX. What is
not known raises: nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

C_TYPES = {
    **{
        f"{kind}{8 * size}": f"{'int' if kind == 's' else 'uint'}{8 * size}_t"
        for kind in "bus"
        for size in (1, 2, 4, 8)
    },
    "f16": "_Float16",
    "bf16": "bf16",
    "f16x2": "uint32_t",
    "bf16x2": "uint32_t",
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
SIZES = {name: int(digits[0]) // 8 for name in C_TYPES if (digits := re.findall(r"\d+$", name)) and "x" not in name}
# What does not change a result here: roundings are to nearest, caches are none, every warp is whole.
MODIFIERS = {"rn", "approx", "ftz", "lo", "global", "cg", "gpu", "acq_rel"}
ARITHMETIC = {
    *("add", "sub", "mul", "mul_hi", "mul_wide", "mad", "mad_wide", "div", "rem", "fma", "neg", "abs", "min", "max"),
    *("and", "or", "xor", "not", "sqrt", "rsqrt", "rcp", "bfe", "prmt"),
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu"}
SPECIAL = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim", "nctaid": "gridDim"}.items()
    for axis in "xyz"
}

Places = dict[str, int]  # the offset of a name


def split(text: str) -> list[str]:
    """At the commas that are in no braces or brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)]


def declared(text: str, space: str, first: int = 0) -> tuple[Places, list[tuple[int, int]], int]:
    """The variables of a state space: (name -> offset, offset and size of each in turn, their end)."""
    places, list_, end = {}, [], first
    pattern = rf"\.{space}\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
    for align, kind, name, count in re.findall(pattern, text):
        size, align = SIZES[kind] * int(count or 1), int(align or SIZES[kind])
        end = -(-end // align) * align
        places[name] = end
        list_.append((end, size))
        end += size
    return places, list_, end


class Kernel:
    def __init__(self, name: str, parameters: str, body: str, shared: Places, shared_end: int) -> None:
        self.name = name
        self.parameters, self.arguments, self.size = declared(parameters, "param")
        self.shared = {**shared, **declared(body, "shared", shared_end)[0]}
        self.registers: set[str] = set()
        self.lines = [line for statement in statements(body) for line in self.translated(statement)]

    def source(self) -> str:
        registers = ", ".join(f"{register} = 0" for register in sorted(self.registers))
        lines = "\n  ".join([f"Register {registers};" if registers else "", *self.lines])
        return f"void {self.name}(const unsigned char* parameters) {{\n  {lines}\n}}"

    def entry(self) -> str:
        arguments = ", ".join(f"{{{offset}, {size}}}" for offset, size in self.arguments)
        return f'{{"{self.name}", {{{self.name}, {self.size}, {{{arguments}}}}}}}'

    def translated(self, statement: str) -> Iterator[str]:
        if statement in "{}":
            yield statement
        elif statement.endswith(":"):
            yield f"{label(statement[:-1])}:;"
        elif statement.startswith(".reg"):
            names = re.sub(r"\.reg\s+\.\w+", "", statement)
            if "%" not in names:  # of a block, which may have the names of another
                yield f"Register {names.strip()} = 0;"
        elif not statement.startswith((".shared", ".pragma")):
            guard, negated, condition = "", "", ""
            if found := re.match(r"@(!?)(\S+)\s+(.*)", statement, re.S):
                negated, condition, statement = found.groups()
                guard = f"if ({negated}get<bool>({self.value(condition)})) "
            op, _, operands = statement.partition(" ")
            yield f"{guard}{{ {self.instruction(op, split(operands))} }}"

    def value(self, operand: str) -> str:
        if operand in SPECIAL:
            return f"put<uint32_t>({SPECIAL[operand]})"
        if operand in self.shared:
            return f"put<uint64_t>({self.shared[operand]})"
        if operand in self.parameters:
            return f"put<const unsigned char*>(parameters + {self.parameters[operand]})"
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", operand):
            return f"0x{operand[2:]}ull"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return f"static_cast<Register>({operand.rstrip('U')}ll)"
        return self.register(operand)

    def register(self, operand: str) -> str:
        if operand == "_":
            return "nothing"
        name = "r_" + operand.removeprefix("%") if operand.startswith("%") else operand
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"an operand: {operand}")
        if operand.startswith("%"):
            self.registers.add(name)
        return name

    def get(self, kind: str, operand: str) -> str:
        return f"get<{C_TYPES[kind]}>({self.value(operand)})"

    def address(self, space: str, operand: str) -> str:
        base, _, offset = (part.strip() for part in operand.strip("[]").partition("+"))
        start = "shared + " if space == "shared" else ""
        place = f"get<uint32_t>({self.value(base)})" if start else f"get<unsigned char*>({self.value(base)})"
        return f"{start}{place} + ({offset or 0})"

    def instruction(self, op: str, operands: list[str]) -> str:
        name, *rest = op.split(".")
        special = getattr(self, f"op_{name}", None)
        if special is not None:
            return str(special(rest, operands))
        *modifiers, kind = rest
        kept = [m for m in modifiers if m not in MODIFIERS]
        if (full := "_".join([name, *kept])) not in ARITHMETIC:
            raise ValueError(f"an instruction: {op} {operands}")
        into, *given = operands
        values = [self.get(kind, operand) for operand in given]
        if full == "mad_wide":
            values[2] = self.get(kind[0] + str(2 * int(kind[1:])), given[2])
        return f"{self.register(into)} = put(ptx::{full}_({', '.join(values)}));"

    def op_mov(self, rest: list[str], operands: list[str]) -> str:
        into, value = operands
        bits = 8 * SIZES.get(rest[-1], 1)
        if into.startswith("{"):
            parts = split(into.strip("{}"))
            width = bits // len(parts)
            return " ".join(
                f"{self.register(part)} = part({self.value(value)}, {i * width}, {width});"
                for i, part in enumerate(parts)
            )
        if value.startswith("{"):
            parts = split(value.strip("{}"))
            width = bits // len(parts)
            joined = " | ".join(f"part({self.value(p)}, 0, {width}) << {i * width}" for i, p in enumerate(parts))
            return f"{self.register(into)} = {joined};"
        return f"{self.register(into)} = put({self.get(rest[-1], value)});"

    def op_cvta(self, rest: list[str], operands: list[str]) -> str:
        if rest not in (["to", "global", "u64"], ["param", "u64"]):  # all addresses are the CPU's
            raise ValueError(f"cvta.{'.'.join(rest)}")
        return f"{self.register(operands[0])} = {self.value(operands[1])};"

    def op_ld(self, rest: list[str], operands: list[str]) -> str:
        into = split(operands[0].strip("{}"))
        kind = C_TYPES[rest[-1]]
        wide = "int64_t" if rest[-1].startswith("s") else kind  # a signed one fills a wider register
        loads = [f"{self.register(r)} = put<{wide}>(load<{kind}>(from, {i}));" for i, r in enumerate(into)]
        return " ".join(
            [f"const auto* from = checked<{kind}, {len(into)}>({self.address(rest[0], operands[1])});", *loads]
        )

    def op_st(self, rest: list[str], operands: list[str]) -> str:
        values = split(operands[1].strip("{}"))
        kind = C_TYPES[rest[-1]]
        stores = [f"store(to, {i}, {self.get(rest[-1], value)});" for i, value in enumerate(values)]
        return " ".join([f"auto* to = checked<{kind}, {len(values)}>({self.address(rest[0], operands[0])});", *stores])

    def op_setp(self, rest: list[str], operands: list[str]) -> str:
        comparison, kind = rest
        if comparison not in COMPARISONS or "|" in operands[0]:
            raise ValueError(f"setp.{'.'.join(rest)} {operands}")
        into, a, b = operands
        return f"{self.register(into)} = put(ptx::setp_{comparison}({self.get(kind, a)}, {self.get(kind, b)}));"

    def op_selp(self, rest: list[str], operands: list[str]) -> str:
        into, a, b, condition = operands
        chosen = f"{self.get('pred', condition)} ? {self.get(rest[-1], a)} : {self.get(rest[-1], b)}"
        return f"{self.register(into)} = put({chosen});"

    def op_cvt(self, rest: list[str], operands: list[str]) -> str:
        *modifiers, to, from_ = rest
        if modifiers == ["rni"] and to == from_:
            return f"{self.register(operands[0])} = put<{C_TYPES[to]}>(std::rint({self.get(from_, operands[1])}));"
        if set(modifiers) - {"rn"}:
            raise ValueError(f"cvt.{'.'.join(rest)}")
        values = ", ".join(self.get(from_, operand) for operand in operands[1:])
        converted = f"ptx::cvt_{to}({values})" if to.endswith("x2") else f"static_cast<{C_TYPES[to]}>({values})"
        return f"{self.register(operands[0])} = put({converted});"

    def shift(self, name: str, rest: list[str], operands: list[str]) -> str:
        into, value, by = operands
        return f"{self.register(into)} = put(ptx::{name}_({self.get(rest[-1], value)}, {self.get('u32', by)}));"

    def op_shl(self, rest: list[str], operands: list[str]) -> str:
        return self.shift("shl", rest, operands)

    def op_shr(self, rest: list[str], operands: list[str]) -> str:
        return self.shift("shr", rest, operands)

    def op_bfi(self, rest: list[str], operands: list[str]) -> str:
        into, a, b, position, length = operands
        where = f"{self.get('u32', position)}, {self.get('u32', length)}"
        return f"{self.register(into)} = put(ptx::bfi_({self.get(rest[-1], a)}, {self.get(rest[-1], b)}, {where}));"

    def op_bra(self, rest: list[str], operands: list[str]) -> str:
        return f"goto {label(operands[0])};"

    def op_ret(self, rest: list[str], operands: list[str]) -> str:
        return "return;"

    def op_bar(self, rest: list[str], operands: list[str]) -> str:
        if operands != ["0"]:
            raise ValueError(f"a barrier of {operands}")
        return "__syncthreads();"

    def op_membar(self, rest: list[str], operands: list[str]) -> str:
        return "__threadfence();"

    def op_shfl(self, rest: list[str], operands: list[str]) -> str:
        into, *given = operands
        if rest != ["sync", "bfly", "b32"]:
            raise ValueError(f"shfl.{'.'.join(rest)}")
        values = ", ".join(self.get("b32", operand) for operand in given)
        return f"{self.register(into.partition('|')[0])} = put(ptx::shfl_bfly({values}));"

    def op_ldmatrix(self, rest: list[str], operands: list[str]) -> str:
        self.check_matrix("ldmatrix", rest)
        into = split(operands[0].strip("{}"))
        taken = " ".join(f"{self.register(part)} = tiles[{i}];" for i, part in enumerate(into))
        return f"Register tiles[{len(into)}]; ptx::ldmatrix({self.address('shared', operands[1])}, tiles); {taken}"

    def op_stmatrix(self, rest: list[str], operands: list[str]) -> str:
        self.check_matrix("stmatrix", rest)
        values = split(operands[1].strip("{}"))
        given = ", ".join(self.value(value) for value in values)
        return f"const Register tiles[] = {{{given}}}; ptx::stmatrix({self.address('shared', operands[0])}, tiles);"

    def check_matrix(self, name: str, rest: list[str]) -> None:
        if {"sync", "aligned", "m8n8", "shared", "b16"} != set(rest) - {"x1", "x2", "x4"}:
            raise ValueError(f"{name}.{'.'.join(rest)}")

    def op_atom(self, rest: list[str], operands: list[str]) -> str:
        if [part for part in rest if part not in MODIFIERS] != ["add", "u32"]:
            raise ValueError(f"atom.{'.'.join(rest)}")
        into, place, value = operands
        at = f"checked<uint32_t, 1>({self.address('global', place)})"
        return f"{self.register(into)} = put(atomicAdd(reinterpret_cast<uint32_t*>({at}), {self.get('u32', value)}));"


def label(name: str) -> str:
    return "L" + re.sub(r"\W", "_", name.strip())


def statements(body: str) -> Iterator[str]:
    """Labels, braces of a block, and what ends in a semicolon."""
    pattern = r"\s*(?:([\w$]+:)(?!:)|([{}])(?=\s*(?:\.reg|cvt|$|[a-z{}@$\n]))|((?:[^;{}]|\{[^{};]*\})+);)"
    at = 0
    while body[at:].strip():
        found = re.compile(pattern).match(body, at)
        if not found:
            raise ValueError(f"no statement: {body[at : at + 80]!r}")
        yield re.sub(r"\s+", " ", next(part for part in found.groups() if part)).strip()
        at = found.end()


def kernels(text: str, wanted: str = "") -> list[Kernel]:
    """Of a PTX module; those whose name has the regular expression."""
    text = re.sub(r"//[^\n]*", "", text).replace("shared::cta", "shared")
    text = re.sub(r"\.ptr(\s+\.global)?(\s+\.align\s+\d+)?", "", text)
    text = re.sub(r"^\s*\.loc\b[^\n]*$", "", text, flags=re.M)
    pattern = r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{(.*?)\n\}"
    shared, _, end = declared(re.sub(pattern, "", text, flags=re.S), "shared")
    found = re.findall(pattern, text, re.S)
    return [Kernel(*entry, shared, end) for entry in found if re.search(wanted, entry[0])]


def translate(text: str, table: str, wanted: str = "") -> str:
    """C++ with a table of that name: kernels by name."""
    found = kernels(text, wanted)
    functions = "\n".join(kernel.source() for kernel in found)
    entries = ",\n    ".join(kernel.entry() for kernel in found)
    head = '#include "machine.h"\n\nusing namespace ptx;\n\nnamespace {'
    named = f"extern const ptx::Table {table};\nconst ptx::Table {table} = {{\n    {entries}}};\n"
    return f"{head}\n{functions}\n}}  // namespace\n\n{named}"
