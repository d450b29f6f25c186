"""What the strings of an exported program may say.

`torch.export.load` gives shape expressions to sympy, which evaluates them as Python; it looks operators
up by dotted path, so that one could be called `torch.os.system`; and it pastes names into source code.
So every string in the program's JSON is checked here, against the form that `torch.export.save` writes.
A string in a place that is not known is refused.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Callable
from typing import Any

import torch

_SYMBOL = re.compile(r"[suz][a-z]{0,3}\d{1,5}")
_PATH = re.compile(r"[\w \-/:+@#=]+(\.[\w \-/:+@#=]+)*", re.ASCII)
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims|torchvision)\.(\w+)\.(\w+)", re.ASCII)
_ON_SIZES = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|getitem)"
    r"|math\.(trunc|ceil|floor)|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
_HIGHER_ORDER = "torch.ops.higher_order."
WITHOUT_GRADIENT = f"{_HIGHER_ORDER}wrap_with_set_grad_enabled"

_NUMBERS = {"Integer", "Rational"}
_POWERS = {"Pow", "PowByNatural", "FloatPow"}
_FUNCTIONS = _POWERS | {
    *("Add", "Mul", "Max", "Min", "Mod", "Abs"),
    *("Equality", "Unequality", "GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan", "And", "Or", "Not"),
    *("FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"),
    *("FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt"),
    *("RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
}
_ASSUMPTIONS = {"integer", "positive", "nonnegative", "negative", "real", "finite", "nonzero"}
_FLOAT = re.compile(r"-?\d{1,20}(\.\d{0,20})?(e[+-]?\d{1,2})?")
_LONGEST_EXPRESSION = 2_000  # characters
_LARGEST_NUMBER = 10**20
_LARGEST_POWER = 8  # of nested ones together: sympy would work out 9**9**9

_TREES = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


class ForbiddenError(Exception):
    """A string that no ordinary program holds."""


class UnsupportedError(Exception):
    """What an ordinary program may hold, and convsurgeon does not read."""


def check_expression(text: str) -> str:
    """Return a shape expression written anew, so that what was checked is what is evaluated.

    >>> check_expression("Add(Integer(1), Symbol('s0', positive=True, integer=True))")
    "Add(Integer(1), Symbol('s0', positive=True, integer=True))"
    """
    forbidden = ForbiddenError(f"the shape expression {_shown(text)}")
    if len(text) > _LONGEST_EXPRESSION:
        raise forbidden
    try:
        tree = ast.parse(text, mode="eval").body
        if _degree(tree) > _LARGEST_POWER:
            raise forbidden
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise forbidden from error


def _degree(node: ast.expr) -> int:
    """Return the highest power in an expression.

    Raises:
        ValueError: if it is no expression about sizes.
    """
    match node:
        case ast.Name(id=name) if _SYMBOL.fullmatch(name) or name in ("true", "false"):
            return 1
        case ast.Constant(value=bool() | int() | float() as value) if abs(value) < _LARGEST_NUMBER:
            return 1
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _degree(operand)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            return _degree(base) * _exponent(exponent)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Div() | ast.Mod()):
            return max(_degree(left), _degree(node.right))
        case ast.Compare(left=left, ops=[ast.Lt() | ast.LtE() | ast.Gt() | ast.GtE() | ast.Eq() | ast.NotEq()]):
            return max(_degree(left), _degree(node.comparators[0]))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _call_degree(name, args, {each.arg: each.value for each in node.keywords})
    raise ValueError


def _call_degree(name: str, args: list[ast.expr], keywords: dict[str | None, ast.expr]) -> int:
    if name == "Symbol" and _is_symbol(args, keywords):
        return 1
    if name == "Float" and len(args) == 1 and isinstance(args[0], ast.Constant):
        bits = keywords.get("precision")
        if _FLOAT.fullmatch(str(args[0].value)) and isinstance(bits, ast.Constant) and bits.value == 53:
            return 1
    if not keywords and args:
        degrees = [_degree(arg) for arg in args]
        if name in _NUMBERS and all(isinstance(arg, ast.Constant | ast.UnaryOp) for arg in args):
            return 1
        if name in _POWERS and len(args) == 2:
            return degrees[0] * _exponent(args[1])
        if name in _FUNCTIONS - _POWERS:
            return max(degrees)
    raise ValueError


def _is_symbol(args: list[ast.expr], keywords: dict[str | None, ast.expr]) -> bool:
    return (
        len(args) == 1
        and isinstance(args[0], ast.Constant)
        and _SYMBOL.fullmatch(str(args[0].value)) is not None
        and all(name in _ASSUMPTIONS for name in keywords)
        and all(isinstance(value, ast.Constant) and isinstance(value.value, bool) for value in keywords.values())
    )


def _exponent(node: ast.expr) -> int:
    """Return the size of a whole exponent, such as `Integer(-1)`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Integer" and node.args:
        node = node.args[0]
    found = ast.literal_eval(node)
    if not isinstance(found, int):
        raise ValueError
    return max(1, abs(found))


def check_size(text: str) -> str:
    """Return the size that a range is for, such as `s77` or `2*s77`, as it is: torch compares the text."""
    check_expression(text)
    return text


def check_path(text: str) -> str:
    """Return the dotted name of a parameter or buffer: no quotes, brackets or line ends."""
    return _matching(_PATH, text, "the name")


def is_path(text: str) -> bool:
    """Whether `check_path` would pass it."""
    return _PATH.fullmatch(text) is not None


def check_identifier(text: str) -> str:
    """Return a name that may stand in source code."""
    if text.isascii() and text.isidentifier() and not keyword.iskeyword(text):
        return text
    raise ForbiddenError(f"the name {_shown(text)}")


def check_operator(text: str) -> str:
    """Return the dotted name of an operator on tensors or sizes, which touches no files.

    Raises:
        UnsupportedError: for control flow, and operators that this torch does not have.
    """
    if _ON_SIZES.fullmatch(text) or text == WITHOUT_GRADIENT:
        return text
    if text.startswith(_HIGHER_ORDER) and text.removeprefix(_HIGHER_ORDER).isidentifier():
        raise UnsupportedError(f"{text.removeprefix(_HIGHER_ORDER)} (control flow, autocast or the like)")
    found = _OPERATOR.fullmatch(text)
    if found is None:
        raise ForbiddenError(f"the operator {_shown(text)}")
    namespace, name, overload = found.groups()
    if namespace == "torchvision":
        import torchvision  # noqa: F401, it registers its operators
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if operator is None:
        raise UnsupportedError(f"the operator {text}, which torch {torch.__version__} does not have")
    if not isinstance(operator, torch._ops.OpOverload) or _names_a_file(operator):
        raise ForbiddenError(f"the operator {_shown(text)}")
    return text


def _names_a_file(operator: torch._ops.OpOverload) -> bool:
    return any("file" in argument.name for argument in operator._schema.arguments)


def check_tree(text: str) -> str:
    """Return how inputs or outputs are nested; what it names beyond tuples, lists and dicts would be imported.

    Raises:
        UnsupportedError: for other classes.
    """
    try:
        version, tree = json.loads(text)
        if version != 1:
            raise UnsupportedError(f"nested inputs or outputs in version {version} of their format")
        _check_node(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ForbiddenError(f"the nesting {_shown(text)}") from error
    return json.dumps([version, tree])


def _check_node(node: dict[str, Any]) -> None:
    if node["type"] is None and node["context"] is None:
        return
    if node["type"] not in _TREES:
        raise UnsupportedError(f"a {node['type']} among its inputs or outputs")
    context = None if node["context"] is None else json.loads(node["context"])
    keys = context if isinstance(context, list) else []
    if not (context is None or isinstance(context, list)) or not all(isinstance(key, str | int) for key in keys):
        raise ValueError
    for child in node["children_spec"]:
        _check_node(child)


def _matching(pattern: re.Pattern[str], text: str, what: str) -> str:
    if pattern.fullmatch(text) is None:
        raise ForbiddenError(f"{what} {_shown(text)}")
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


_STRINGS: dict[str, Callable[[str], str]] = {
    "expr_str": check_expression,
    "target": check_operator,
    "as_operator": check_operator,
    "name": lambda text: check_identifier(text) if text else text,
    "as_name": check_identifier,
    "user_input_name": check_identifier,
    "verifiers": check_identifier,
    "forward_arg_names": check_identifier,
    "parameter_name": check_path,
    "buffer_name": check_path,
    "tensor_constant_name": check_path,
    "in_spec": check_tree,
    "out_spec": check_tree,
    "as_string": str,  # an argument of an operator: stands in source code as its repr
    "as_strings": str,
}
_KEYS: dict[str, Callable[[str], str]] = {
    "tensor_values": check_identifier,
    "sym_int_values": check_identifier,
    "sym_float_values": check_identifier,
    "sym_bool_values": check_identifier,
    "range_constraints": check_size,
    "opset_version": check_identifier,
    "as_string_to_argument": check_identifier,
}
_NOT_NEEDED: dict[str, Any] = {
    "guards_code": [],  # Python source, run by ExportedProgram.module()
    "treespec_namedtuple_fields": {},
    "torch_version": "",
}
_FLOATS = ("as_float", "as_floats", "as_float_lists", "real", "imag")


def clean_program(value: Any, key: str = "") -> Any:
    """Return the JSON of a program with every string checked, on the CPU, and without what no lift needs.

    Raises:
        ForbiddenError: for what no ordinary program holds.
        UnsupportedError: for what convsurgeon does not read.
    """
    if key in _NOT_NEEDED:
        return _NOT_NEEDED[key]
    if key in ("as_custom_obj", "custom_obj"):
        raise UnsupportedError("an object of a custom class")
    if key in ("device", "as_device"):
        return {"type": "cpu", "index": None}
    if key == "metadata":
        stack = value.get("nn_module_stack") if isinstance(value, dict) else None
        return {"nn_module_stack": stack} if isinstance(stack, str) else {}
    if key == "module_call_graph":  # of the submodules it says only how to call them
        value = [entry for entry in value if isinstance(entry, dict) and entry.get("fqn") == ""]
        return [{"fqn": "", "signature": clean_program(entry.get("signature"))} for entry in value]
    if isinstance(value, dict):
        check = _KEYS.get(key, str)
        return {check(name): clean_program(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [clean_program(item, key) for item in value]
    if isinstance(value, str):
        if key in _FLOATS and value in ("Infinity", "-Infinity", "NaN"):
            return value
        if key not in _STRINGS:
            raise ForbiddenError(f"{_shown(value)} under {_shown(key)}")
        return _STRINGS[key](value)
    return value
