"""Formulas as the site shows them: LaTeX, and the vocabulary's code, which a test evaluates, become MathML.

MathML is text that browsers typeset themselves: the page fetches nothing.
"""

from __future__ import annotations

import ast
import html
import re

from latex2mathml.converter import convert

SYMBOLS = {
    "alpha": r"\alpha",
    "sigma": r"\sigma",
    "eps": r"\varepsilon",
    "beta": r"\beta",
    "gamma": r"\gamma",
    "delta": r"\delta",
    "eta": r"\eta",
    "xi": r"\xi",
    "mu": r"\mu",
    "rho": r"\rho",
    "tau": r"\tau",
    "pi": r"\pi",
    "kl": r"\mathrm{KL}",
    "betas": r"\beta",
    "alpha_bar": r"\bar\alpha",
    "snr": r"\mathrm{SNR}",
    "x0": "x_0",
    "x0_hat": r"\hat x_0",
    "max_beta": r"\beta_{\max}",
    "log_var": r"\log\mathrm{var}",
}
FUNCTIONS = {name: rf"\{name}" for name in ("exp", "log", "cos", "sin")} | {"minimum": r"\min", "maximum": r"\max"}
NAMED = {"S", "sign", "cumprod", "linspace", "by_clipped_betas", "rho", "KL", "mean", "sum", "enlarged", "net", "norm"}
SUM, PRODUCT, NEGATED, POWER, ATOM = range(5)


def latex(code: str) -> str:
    """Of assignments and expressions, parted by semicolons. Raises ValueError for what is no formula."""
    return r",\quad ".join(_line(part.strip()) for part in code.split(";"))


def _line(code: str) -> str:
    try:
        tree = ast.parse(code.replace("^", "**")).body
    except SyntaxError as error:
        raise ValueError(code) from error
    match tree:
        case [ast.Assign([target], value)]:
            return f"{_at(target, SUM)} = {_at(value, SUM)}"
        case [ast.Expr(value)] if not isinstance(value, ast.Name) or value.id in SYMBOLS:
            return _at(value, SUM)
    raise ValueError(code)


def _at(node: ast.expr, least: int) -> str:
    """In parentheses where it binds less than its place asks."""
    made, strength = _made(node)
    return made if strength >= least else rf"\left({made}\right)"


def _made(node: ast.expr) -> tuple[str, int]:
    match node:
        case ast.Constant(int() | float() as value):
            return f"{value:g}", ATOM
        case ast.Name(name):
            return _name(name), ATOM
        case ast.Subscript(value, index):
            return f"{_at(value, ATOM)}_{{{_at(index, SUM)}}}", ATOM
        case ast.UnaryOp(ast.USub(), value):
            return f"-{_at(value, PRODUCT)}", NEGATED - 1
        case ast.BinOp(a, ast.Add(), b):
            return f"{_at(a, SUM)} + {_at(b, SUM)}", SUM
        case ast.BinOp(a, ast.Sub(), b):
            return f"{_at(a, SUM)} - {_at(b, PRODUCT)}", SUM
        case ast.BinOp(a, ast.Mult(), b):
            between = r" \cdot " if isinstance(b, ast.Constant) else r"\,"
            return f"{_at(a, PRODUCT)}{between}{_at(b, PRODUCT)}", PRODUCT
        case ast.BinOp(a, ast.Div(), b):
            return rf"\frac{{{_at(a, SUM)}}}{{{_at(b, SUM)}}}", POWER
        case ast.BinOp(a, ast.Pow(), b):
            return f"{_at(a, ATOM)}^{{{_at(b, SUM)}}}", POWER
        case ast.Compare(a, [ast.LtE()], [b]):
            return rf"{_at(a, SUM)} \le {_at(b, SUM)}", SUM
        case ast.Call(ast.Name("sqrt"), [value]):
            return rf"\sqrt{{{_at(value, SUM)}}}", ATOM
        case ast.Call(ast.Name("abs"), [value]):
            return rf"\lvert {_at(value, SUM)} \rvert", ATOM
        case ast.Call(ast.Name("where"), [test, a, b]):
            rows = rf"{_at(a, SUM)} & {_at(test, SUM)} \\ {_at(b, SUM)} & \text{{else}}"
            return rf"\begin{{cases}} {rows} \end{{cases}}", ATOM
        case ast.Call(ast.Name(name), values) if name in FUNCTIONS or name in NAMED:
            letter = name in SYMBOLS or len(name) == 1
            called = FUNCTIONS.get(name) or (_name(name) if letter else rf"\mathrm{{{_text(name)}}}")
            return rf"{called}\left({', '.join(_at(v, SUM) for v in values)}\right)", ATOM
    raise ValueError(ast.unparse(node))


def _name(name: str) -> str:
    if name in SYMBOLS:
        return SYMBOLS[name]
    first, *lower = re.sub(r"^([a-z])(\d+)$", r"\1_\2", name).split("_")
    base = SYMBOLS.get(first, first if len(first) == 1 else rf"\mathrm{{{first}}}")
    if not lower:
        return base
    below = ", ".join(part if len(part) == 1 else rf"\mathrm{{{part}}}" for part in lower)
    return f"{base}_{{{below}}}"


def _text(name: str) -> str:
    return name.replace("_", r"\_")


def typeset(page: str, *, code: bool) -> str:
    """A page's HTML with MathML for what arithmatex marked and, with code, for the code spans that are formulas."""

    def of_latex(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "[" else "inline")

    def of_code(found: re.Match[str]) -> str:
        try:
            return convert(latex(html.unescape(found[1])))
        except ValueError:
            return found[0]

    marked = r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>'
    page = re.sub(marked, of_latex, page, flags=re.DOTALL)
    return re.sub(r"<code>([^<]*)</code>", of_code, page) if code else page
